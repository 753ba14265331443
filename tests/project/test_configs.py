"""Every YAML that ships loads, and every key in it is one that exists."""

from pathlib import Path

import pytest

from vcr1_fast.config import Config
from vcr1_fast.config_io import load_config, load_settings
from vcr1_fast.synth.config import SynthConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_loads(path: Path):
    config = load_config(str(path), [])
    assert isinstance(config, Config)
    assert config != Config(), "a config that changes nothing"
    config.check_world_size(1)


@pytest.mark.parametrize("config_class", [Config, SynthConfig])
def test_packaged_config_loads(config_class: type):
    config = load_settings(config_class, "tiny", [])
    assert isinstance(config, config_class) and config != config_class()


def test_every_config_is_listed_in_the_readme_of_the_folder():
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in CONFIGS if path.name not in text] == []
