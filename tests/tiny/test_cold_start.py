"""The command that rebuilds the packaged models, on a few clips and for two steps."""

from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoTokenizer

from vcr1_fast.run.model_folder import PACKAGED
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.tiny.cold_start import MODEL_FILES, TYPES, rebuild


@pytest.mark.parametrize("name", TYPES)
def test_rebuild_writes_a_model_of_the_packaged_shape(tmp_path: Path, name: str) -> None:
    destination, package = tmp_path / "model", PACKAGED[name]
    destination.mkdir()
    clips = SynthConfig(num_train=4, num_eval=1, duration_s=8.0, label_lag_s=0.9, label_slack_frac=0.1)
    settings = ["--sft.num_steps=2", "--sft.examples_per_step=4", "--checkpoint.every=0"]
    rebuild(tmp_path, destination, TYPES[name], clips, settings)
    assert sorted(path.name for path in destination.iterdir()) == sorted(MODEL_FILES)
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in destination.iterdir())
    built, packaged = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (destination, package))
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in packaged.named_parameters()}
    tokenizers = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (destination, package)]
    assert tokenizers[0] == tokenizers[1]
    assert sum(path.stat().st_size for path in package.iterdir() if path.is_file()) < 5_000_000
