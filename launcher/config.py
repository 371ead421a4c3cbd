"""A run from YAML files and overrides: Hydra composes it, nothing below this file sees a DictConfig.

Hydra stops at the first mistake and knows no types, so it is asked for one thing only: to merge YAML files and
overrides into a tree. Keys are compared with the dataclasses before, values are converted after, and every mistake
found on the way is reported together.
"""

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from launcher.renamed import modern, told
from launcher.run_config import RunConfig
from launcher.run_config import TrainConfig as TrainConfig  # its readers know one place for both

GROUPS = ("model", "parallel", "optim", "data", "experiment")


class ConfigError(ValueError):
    """Every mistake found in a configuration, one line each in `errors`."""

    user_error = True  # the command line prints these without a traceback

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)


@dataclass(frozen=True)
class Draft:
    """A configuration with what is wrong in it.

    config: the run with the wrong overrides left out, so that more can be checked; None where even that cannot be
    built. errors: one line for each mistake. bad_keys: keys whose given value is not the one in `config`.
    """

    config: RunConfig | None
    errors: tuple[str, ...]
    bad_keys: tuple[str, ...]


def compose(overrides: Sequence[str]) -> RunConfig:
    """The run that configs/train.yaml and the Hydra overrides (`experiment=tiny`, `parallel.pipeline=4`) describe.

    Raises ConfigError with every unknown key, wrong type, missing key, unknown choice and malformed override.
    """
    result = draft(overrides)
    if result.errors or result.config is None:
        raise ConfigError(result.errors)
    return result.config


def draft(overrides: Sequence[str]) -> Draft:
    """As `compose`, but returns the errors beside what could be built without the wrong overrides."""
    errors: list[str] = []
    bad_keys: list[str] = []
    parsed = _parse(overrides, errors, bad_keys)
    _drop_unmergeable(parsed, errors, bad_keys)
    found: dict[str, str] = {}
    config = None
    try:
        config = convert(RunConfig, _merge(parsed.values()), found)
        if config is None:
            bad_keys.extend(found)
            rest = [text for key, text in parsed.items() if not any(_related(key, path) for path in found)]
            config = convert(RunConfig, _merge(rest), {}) if len(rest) < len(parsed) else None
    except ConfigError as error:
        errors.extend(error.errors)
    return Draft(config, tuple(dict.fromkeys([*errors, *found.values()])), tuple(bad_keys))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The run as plain dicts, lists and scalars that JSON and YAML can hold; `from_dict` rebuilds it exactly."""
    return _plain(config)


def from_dict(tree: Mapping[str, Any]) -> RunConfig:
    """The run from what `to_dict` returned, of an earlier version too; raises ConfigError as `compose` does."""
    found: dict[str, str] = {}
    config = convert(RunConfig, modern(tree, found), found)
    if found or config is None:
        raise ConfigError(list(found.values()))
    return config


def to_yaml(config: RunConfig) -> str:
    """The run as YAML, in the order of the dataclasses."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=120)


def choices(group: str) -> list[str]:
    """Names of the YAML files of one group of configs/, sorted."""
    root = _config_dir() / group
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def experiment_source(name: str) -> dict[str, Any]:
    """What the YAML file of one experiment says itself, before Hydra merges it with others."""
    import yaml

    return yaml.safe_load((_config_dir() / "experiment" / f"{name}.yaml").read_text())


@cache
def known_keys() -> tuple[str, ...]:
    """Every key of a run in dotted form, sections included, elements of lists not."""
    return tuple(_walk_keys(RunConfig, ""))


# --- overrides ---------------------------------------------------------------------------------------------------


def _parse(overrides: Sequence[str], errors: list[str], bad_keys: list[str]) -> dict[str, str]:
    """The overrides that Hydra may see, by key, in its grammar; the last one of a key wins."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    good: dict[str, str] = {}
    for text in overrides:
        if text.startswith("=") or ("=" not in text and not text.startswith("~")):
            errors.append(f"{text}: not an override; write key=value")
            continue
        try:
            parsed = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            errors.append(f"{text}: cannot be read ({reason}); put text with special characters in quotes")
            bad_keys.append(text.split("=")[0].lstrip("+~"))
            continue
        key = parsed.key_or_group
        value = None if parsed.is_delete() or parsed.is_sweep_override() else parsed.value()
        error = _override_error(text, key, value, parsed.is_sweep_override(), parsed.is_delete())
        if error or parsed.package is not None:
            errors.append(error or f"{text}: packages (@) are not supported; write key=value")
            bad_keys.append(key)
        elif parsed.is_delete():
            good[key] = text
        elif key == "experiment" and value is None:
            good.pop(key, None)  # as if never chosen; Hydra takes no null here
        else:  # ++: a key of the dataclass may be set whether or not a YAML file mentions it
            good.pop(key, None)
            good[key] = text.lstrip("+") if key in GROUPS else "++" + text.lstrip("+")
    return good


def _drop_unmergeable(parsed: dict[str, str], errors: list[str], bad_keys: list[str]) -> None:
    """Takes out and reports the overrides that Hydra refuses whatever the others are: Hydra itself names only one."""
    groups = [text for key, text in parsed.items() if key in GROUPS]
    try:
        _merge(parsed.values())
        return
    except ConfigError:
        suspects = [key for key in parsed if key not in GROUPS]
    for key in suspects:
        try:
            _merge([*groups, parsed[key]])
        except ConfigError as error:
            errors.append(f"{parsed.pop(key).lstrip('+')}: {error}")
            bad_keys.append(key)


def _override_error(text: str, key: str, value: object, is_sweep: bool, is_delete: bool) -> str | None:
    if key not in GROUPS and not _key_exists(key):
        return no_such_key(key)
    if is_sweep and key in GROUPS:
        return f"{text}: one run takes one choice; use {_either(choices(key))}"
    if is_sweep:
        given = text.split("=", 1)[1]
        return f"{text}: one run takes one value; a list is written {key}=[{given}]"
    if key in GROUPS:
        if is_delete:
            return f"{text}: {key} cannot be deleted; choose {_either(choices(key))}"
        if str(value) not in choices(key) and not (key == "experiment" and value is None):
            return f"{key}={value}: no such choice; use {_either(choices(key))}"
    return None


def no_such_key(key: str, siblings: Sequence[str] = ()) -> str:
    """The line that reports an unknown key, with the likeliest one that exists; `siblings` are those beside it."""
    if said := told(key):
        return said
    section, _, leaf = key.rpartition(".")
    beside = list(siblings) or [name for name in (*known_keys(), *GROUPS) if name.rpartition(".")[0] == section]
    # the name misspelt; else the right name in another section; else the section misspelt
    searches = [
        (leaf, {name.rpartition(".")[2]: name for name in beside}, 0.6),
        (leaf, {name.rpartition(".")[2]: name for name in known_keys()}, 0.75),
    ]
    if not beside:
        searches.append((key, {name: name for name in known_keys()}, 0.6))
    for word, names, cutoff in searches:
        near = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
        if near:
            return f"{key}: no such key; did you mean {names[near[0]]}?"
    known = sorted(beside) if section else [field.name for field in fields(RunConfig)]
    return f"{key}: no such key; known are {', '.join(known or GROUPS)}"


def _merge(overrides: Iterable[str]) -> dict[str, Any]:
    """What Hydra makes of configs/train.yaml and the overrides, as plain containers; raises ConfigError."""
    import hydra
    from hydra.core.singleton import Singleton
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    state = Singleton.get_state()  # Hydra keeps its settings in process-wide singletons: leave none behind
    try:
        with hydra.initialize_config_dir(str(_config_dir()), version_base=None):
            tree = hydra.compose("train", overrides=list(overrides))
        return cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError([reason]) from error
    finally:
        Singleton.set_state(state)


def _config_dir() -> Path:
    import configs

    return Path(next(iter(configs.__path__))).resolve()


# --- the tree of dataclasses -------------------------------------------------------------------------------------


def convert(kind: Any, value: Any, errors: dict[str, str], path: str = "") -> Any:
    """`value` as an instance of the annotation `kind`: a dataclass, tuple, optional, int, float, bool or str.

    Mistakes go to `errors`, keyed by dotted path; the result is then None, unless all of them are unknown keys.
    """
    optional = _without_none(kind)
    if optional is not None:
        return None if value is None else convert(optional, value, errors, path)
    if is_dataclass(kind):
        return _convert_dataclass(cast(type, kind), value, errors, path)
    if get_origin(kind) in (Union, types.UnionType):  # a number or a list
        kind = next(arg for arg in get_args(kind) if (get_origin(arg) is tuple) == isinstance(value, list | tuple))
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            return _fail(errors, path, value, "a list in brackets")
        return tuple(convert(get_args(kind)[0], item, errors, f"{path}.{i}") for i, item in enumerate(value))
    if value == "???" or value is None:
        errors[path] = f"{path}: no value; set {path}={_EXAMPLES[kind]}"
        return None
    return _convert_scalar(kind, value, errors, path)


def _convert_dataclass(kind: type, value: Any, errors: dict[str, str], path: str) -> Any:
    if not isinstance(value, Mapping):
        return _fail(errors, path or "config", value, "a mapping with keys " + ", ".join(f.name for f in fields(kind)))
    hints = get_type_hints(kind)
    prefix = f"{path}." if path else ""
    for name in value:
        if name not in hints:
            errors[f"{prefix}{name}"] = no_such_key(f"{prefix}{name}", [prefix + hint for hint in hints])
    arguments: dict[str, Any] = {}
    complete = True
    for field in fields(kind):
        where = prefix + field.name
        if field.name in value:
            before = len(errors)
            arguments[field.name] = convert(hints[field.name], value[field.name], errors, where)
            # None is a good value only of an optional field
            lost = arguments[field.name] is None and _without_none(hints[field.name]) is None
            bad_item = isinstance(arguments[field.name], tuple) and None in arguments[field.name]
            lost_inside = arguments[field.name] is None and len(errors) > before
            complete = complete and not (lost or bad_item or lost_inside)
        elif field.default is MISSING and field.default_factory is MISSING:
            errors[where] = f"{where}: missing; set {where}={_EXAMPLES.get(hints[field.name], '...')}"
            complete = False
    return kind(**arguments) if complete else None


def _convert_scalar(kind: type, value: Any, errors: dict[str, str], path: str) -> Any:
    if kind is bool:
        text = str(value).lower()
        return text == "true" if text in ("true", "false") else _fail(errors, path, value, "true or false")
    if kind is str:
        is_text = isinstance(value, str | int | float) and not isinstance(value, bool)
        return str(value) if is_text else _fail(errors, path, value, "text")
    expected = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _fail(errors, path, value, expected)
    if kind is int and isinstance(value, int):
        return value  # not through float: 2**53 + 1 stays itself
    try:
        if kind is int and isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
            return int(value)
        number = float(value)
    except ValueError:
        return _fail(errors, path, value, expected)
    if number != number or (kind is int and not number.is_integer()):
        return _fail(errors, path, value, expected)
    return int(number) if kind is int else number


_EXAMPLES: dict[Any, str] = {int: "1", float: "1.0", str: "TEXT", bool: "true"}


def _fail(errors: dict[str, str], path: str, value: Any, expected: str) -> None:
    errors[path] = f"{path}={value}: expected {expected}"


def _without_none(kind: Any) -> Any:
    """X of `X | None`; None for every other annotation."""
    if type(None) not in get_args(kind):
        return None
    return next((arg for arg in get_args(kind) if arg is not type(None)), None)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)  # JSON has no infinity; `convert` reads the word
    return value


def _walk_keys(kind: Any, prefix: str) -> Iterator[str]:
    for name, hint in get_type_hints(kind).items():
        yield prefix + name
        inner = _without_none(hint) or hint
        if is_dataclass(inner):
            yield from _walk_keys(inner, f"{prefix}{name}.")


def _key_exists(key: str) -> bool:
    kind: Any = RunConfig
    for part in key.split("."):
        kind = _without_none(kind) or kind
        if part.isdecimal():
            kind = next((arg for arg in get_args(kind) if get_origin(arg) is tuple), kind)  # of a number or a list
        if get_origin(kind) is tuple and part.isdecimal():
            kind = get_args(kind)[0]
        elif is_dataclass(kind) and part in get_type_hints(kind):
            kind = get_type_hints(kind)[part]
        else:
            return False
    return True


def _related(key: str, path: str) -> bool:
    return key == path or path.startswith(key + ".") or key.startswith(path + ".")


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1] if names else "nothing"
