"""`vcr1-fast completion bash|zsh`: a script that completes commands, settings, and the values of those that have few.

    source <(vcr1-fast completion bash)

Names are written into the script, so that completing starts no Python. Called by cli.py; loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

# bash cuts a word at "=", zsh does not: `head` is what of it stays before the value.
_SCRIPT = """\
_vcr1_fast() {
  local word="${COMP_WORDS[COMP_CWORD]}" key="" head="" words=""
  if [[ $COMP_CWORD -eq 1 ]]; then
    words="%(commands)s"
  elif [[ $word == --*=* ]]; then
    key="${word%%%%=*}" head="${word%%%%=*}="
  elif [[ $word == "=" ]]; then
    key="${COMP_WORDS[COMP_CWORD-1]}" word=""
  elif [[ ${COMP_WORDS[COMP_CWORD-1]} == "=" ]]; then
    key="${COMP_WORDS[COMP_CWORD-2]}"
  elif [[ $word == -* ]]; then
    case "${COMP_WORDS[1]}" in
%(settings)s
    esac
  fi
  case "$key" in
%(values)s
  esac
  COMPREPLY=($(compgen -P "$head" -W "$words" -- "${word#"$head"}"))
  [[ ${COMPREPLY[0]:-} == *= ]] || compopt +o nospace 2>/dev/null || true
}
complete -o default -o nospace -F _vcr1_fast vcr1-fast
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def completion_script(shell: Literal["bash", "zsh"], commands: Mapping[str, Mapping[str, Any]]) -> str:
    """`commands`: name -> the types of its settings by dotted key; none for a command that has no settings."""
    settings: dict[str, list[str]] = {}  # the same words -> the commands that take them
    values: dict[str, str] = {}
    for name, types in commands.items():
        if types:
            words = " ".join(["--help", "--help-all", *(f"--{key}=" for key in types)])
            settings.setdefault(words, []).append(name)
        values |= {key: choices for key, kind in types.items() if (choices := _choices(kind))}
    script = _SCRIPT % {
        "commands": " ".join(commands),
        "settings": "\n".join(f'      {"|".join(names)}) words="{words}" ;;' for words, names in settings.items()),
        "values": "\n".join(f'    --{key}) words="{choices}" ;;' for key, choices in values.items()),
    }
    return (_ZSH if shell == "zsh" else "") + script


def _choices(kind: Any) -> str:
    """The values of a setting that has few, "" of any other, and of a list or mapping."""
    if kind is bool:
        return "true false"
    if get_origin(kind) in (dict, tuple):
        return ""
    literal = next((part for part in (kind, *get_args(kind)) if get_origin(part) is Literal), None)
    return " ".join(map(str, get_args(literal)))
