"""The command that rebuilds the packaged model, on a few clips and for two steps."""

from pathlib import Path

from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.tiny.cold_start import MODEL_FILES, PACKAGE, rebuild


def test_rebuild_writes_a_model_of_the_packaged_shape(tmp_path: Path) -> None:
    destination = tmp_path / "model"
    destination.mkdir()
    clips = SynthConfig(num_train=4, num_eval=1, duration_s=8.0, label_lag_s=0.9, label_slack_frac=0.1)
    rebuild(tmp_path, destination, clips, ["--sft.num_steps=2", "--sft.examples_per_step=4", "--checkpoint.every=0"])
    assert sorted(path.name for path in destination.iterdir()) == sorted(MODEL_FILES)
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in destination.iterdir())
    built, packaged = (Qwen2_5_VLForConditionalGeneration.from_pretrained(f) for f in (destination, PACKAGE))
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in packaged.named_parameters()}
    tokenizers = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (destination, PACKAGE)]
    assert tokenizers[0] == tokenizers[1]
    assert sum(path.stat().st_size for path in PACKAGE.iterdir() if path.is_file()) < 5_000_000
