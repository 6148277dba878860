"""Moves settings of a model's config, which mlx-lm's class would overlook, to where that class looks for them.

Comes in: config.json, and mlx-lm's classes. Goes out: a config that mlx-lm understands, and notes about the changes.
A setting for which mlx-lm's class has no place is refused.
"""

import contextlib
import copy
import inspect
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..errors import ModelError
from ..weights.recognise import read_json

Classes = Callable[[dict], tuple[type[nn.Module], type]]  # a config -> mlx-lm's classes of model and arguments
NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
MAX_LAYERS = 2_000  # the deepest published models have 126
LAYERS = re.compile(r"layers?$")
# Names that mlx-lm's classes have for the settings that transformers 5 keeps in rope_parameters.
BASE = ("rope_theta", "rotary_emb_base", "rope_freq_constant", "rope_embedding_base")
LOCAL_BASE = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta")
FRACTION = ("partial_rotary_factor", "rotary_pct", "rope_pct")
FULL, LOCAL = ("full_attention", "global_attention", "global"), ("sliding_attention", "local_attention", "local")


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model directory.

    Raises:
        ModelError: there is none, or the file holds something else.
    """
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise ModelError(f"{path / 'config.json'} holds a {type(config).__name__}. Give a model's config.json")
    check_depth(path / "config.json", config)
    return config


def check_depth(file: Path, config: dict[str, Any]) -> None:
    """Refuse more layers than any model has: mlx-lm would make an object for each, until memory is full.

    Raises:
        ModelError: a setting asks for more than `MAX_LAYERS`; names it.
    """
    for part in (config, *(config.get(name) for name in NESTED)):
        for name, value in part.items() if isinstance(part, dict) else ():
            if LAYERS.search(name) and isinstance(value, int | float) and value > MAX_LAYERS:
                raise ModelError(
                    f"{file}: {ascii(name[:60])} is {str(value)[:20]}, and no model has {MAX_LAYERS} "
                    "layers. Download it again"
                )


@contextlib.contextmanager
def _arguments_recorded() -> Iterator[list[tuple[type, dict]]]:
    """Record from which mapping each of mlx-lm's classes of arguments is made: the model's and those of its parts."""
    from mlx_lm.models.base import BaseModelArgs

    made: list[tuple[type, dict]] = []
    original = BaseModelArgs.__dict__["from_dict"]

    def from_dict(cls, params):
        made.append((cls, params))
        return original.__func__(cls, params)

    BaseModelArgs.from_dict = classmethod(from_dict)
    try:
        yield made
    finally:
        BaseModelArgs.from_dict = original


def arguments(config: dict, classes: Classes) -> list[tuple[type, dict]]:
    """(mlx-lm's class of arguments, the part of `config` that it is made from), for a model and the models within it.

    A model that only wraps another (as one for images and text wraps the text model) is left out.
    """
    model_class, args_class = classes(config)
    wraps = any(has(args_class, name) for name in NESTED)
    nested = [config[name] for name in NESTED if isinstance(config.get(name), dict)]
    with _arguments_recorded() as made, contextlib.redirect_stdout(io.StringIO()):
        with contextlib.suppress(Exception):  # if mlx-lm cannot build the model, loading reports it later
            args = args_class.from_dict(copy.deepcopy(config))
            if wraps:
                model_class(args)  # nothing is evaluated
    parts = [] if wraps else [(args_class, config)]
    for cls, params in made:
        if cls is not args_class and not any(cls is other for other, _ in parts):
            part = max(nested, key=lambda part: len(params.keys() & part.keys()), default=config)
            parts.append((cls, part))
    return parts


def has(cls: type, name: str) -> bool:
    return name in inspect.signature(cls).parameters


# --- Rotary embedding -------------------------------------------------------------------------------


def pass_on_rope(path: Path, config: dict, classes: Classes) -> tuple[dict, list[str]]:
    """Put the rotary embedding that transformers 5 describes in rope_parameters where mlx-lm's class looks for it.

    Returns:
        The changed config, and notes for a person.
    Raises:
        ModelError: mlx-lm's class has no place for one of the values.
    """
    if not any(_described(part) for part in (config, *(config.get(name) or {} for name in NESTED))):
        return config, []
    config, notes = copy.deepcopy(config), []
    for cls, part in arguments(config, classes):
        # the whole config's description holds for a text model whose own part has none
        if (described := _described(part) or _described(config)) is None:
            continue
        before = dict(part)
        theta, is_plain = described.get("rope_theta"), _kind(described) == "default"
        if theta is not None and not any(has(cls, name) for name in (*BASE, "rope_parameters")):
            if set(_bases(config, classes)) <= {theta}:
                continue  # the model has no rotary embedding, or has this base already
        kinds = set(part.get("layer_types") or ())
        if theta is not None and kinds and has(cls, "rope_parameters") and not has(cls, "rope_theta"):
            if (bases := _bases(config, classes)) and theta not in bases:
                # the class looks for an entry of each kind of layer
                part["rope_parameters"] = described | {kind: described for kind in sorted(kinds)}
        with contextlib.redirect_stdout(io.StringIO()):
            _pass_on(path, cls, part, described)
        changed = {key: part[key] for key in part if part[key] != before.get(key) and part[key] is not None}
        if not changed:
            continue
        bases = _bases(config, classes)
        if theta is not None and is_plain and bases and theta not in bases:
            raise _Refusal(path, cls)("rope_theta", theta)  # the class takes the argument and ignores it
        given = ", ".join(f"{k} {v if not isinstance(v, dict) else _kind(v)}" for k, v in changed.items())
        notes.append(
            f"{path / 'config.json'} has its rotary embedding in rope_parameters, as transformers 5 writes it: "
            f"used as {given}; mlx-lm's own commands would take their default"
        )
    return config, notes


def _bases(config: dict, classes: Classes) -> list[float]:
    """The bases of the rotary embeddings in mlx-lm's model. Those that keep only their frequencies are not included."""
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        model_class, args_class = classes(config)
        model = model_class(args_class.from_dict(copy.deepcopy(config)))
        return [m.base for n, m in model.named_modules() if re.search("rope|rotary", n) and hasattr(m, "base")]
    return []


def _described(part: dict) -> dict | None:
    """The part's description of the rotary embedding in the form of transformers 5, if it has one."""
    given = part.get("rope_parameters")
    if isinstance(given, dict) and given:
        return given
    scaling = part.get("rope_scaling")
    return scaling if isinstance(scaling, dict) and "rope_theta" in scaling else None


def _pass_on(path: Path, cls: type, part: dict, described: dict) -> None:
    by_layer = {key: value for key, value in described.items() if isinstance(value, dict)}
    if by_layer and has(cls, "rope_parameters"):
        return  # the class reads an entry for each kind of layer itself
    refuse = _Refusal(path, cls)
    full = next((by_layer[key] for key in FULL if key in by_layer), None)
    if by_layer and full is None:
        full = next(iter(by_layer.values()))
    common = {key: value for key, value in described.items() if not isinstance(value, dict)}
    whole = common | (full or {})
    local = next((common | by_layer[key] for key in LOCAL if key in by_layer), None)
    others = [key for key in by_layer if key not in (*FULL, *LOCAL) and by_layer[key] is not full]
    for key in others:
        if common | by_layer[key] != whole:
            raise refuse(f"rope_parameters.{key}", by_layer[key])
    _put_base(refuse, part, BASE, "rope_theta", whole.get("rope_theta"))
    _put_fraction(refuse, part, whole)
    _put_scaling(refuse, part, whole)
    length = "original_max_position_embeddings"
    if has(cls, length) and whole.get(length) is not None and part.get(length) is None:
        part[length] = whole[length]
    if local is not None and full is not local:
        theta = local.get("rope_theta", whole.get("rope_theta"))
        if any(has(cls, name) for name in LOCAL_BASE):
            _put_base(refuse, part, LOCAL_BASE, "rope_theta of sliding_attention", theta)
        elif theta != whole.get("rope_theta"):
            raise refuse("rope_parameters.sliding_attention.rope_theta", theta)
        if _kind(local) != "default":
            raise refuse("rope_parameters.sliding_attention.rope_type", _kind(local))


class _Refusal:
    """Makes the errors for settings of `path`'s config for which the class has no place."""

    def __init__(self, path: Path, cls: type):
        self.path, self.cls = path, cls

    def __call__(self, name: str, value: Any) -> ModelError:
        module = self.cls.__module__.rpartition(".")[2]
        return ModelError(
            f"{self.path / 'config.json'} gives {name} = {value}, for which mlx-lm's {module} has no place: it would "
            "compute another rotary embedding. Use a model that mlx-lm reads, or a newer mlx-lm"
        )


def _kind(rope: dict) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _read(cls: type, part: dict, name: str) -> Any:
    """The value of `name` in the arguments that the class makes from `part`; None if it fails or has no such value."""
    try:
        return getattr(cls.from_dict(copy.deepcopy(part)), name, None)
    except Exception:
        return None


def _put_base(refuse: _Refusal, part: dict, names: tuple[str, ...], called: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"{refuse.path / 'config.json'} gives {called} = {value!r}, which is no number. Correct it")
    cls = refuse.cls
    name = next((name for name in names if has(cls, name)), None)
    if name is None:
        if has(cls, "rope_parameters"):
            return  # the class reads the base from there
        raise refuse(called, value)
    if _read(cls, part, name) == value:
        return
    if part.get(name) not in (None, value):
        raise ModelError(
            f"{refuse.path / 'config.json'} gives {name} {part[name]}, and in rope_parameters {value}. Leave the one "
            "that is meant"
        )
    part[name] = value


def _put_fraction(refuse: _Refusal, part: dict, rope: dict) -> None:
    value = rope.get("partial_rotary_factor")
    cls = refuse.cls
    if value is None or (has(cls, "rope_parameters") and not has(cls, "partial_rotary_factor")):
        return
    name = next((name for name in FRACTION if has(cls, name)), None)
    if name is not None:
        if _read(cls, part, name) != value:
            part[name] = value
    elif has(cls, "rotary_dim"):
        width = part.get("head_dim") or part["hidden_size"] // part["num_attention_heads"]
        part.setdefault("rotary_dim", int(width * value))
    elif value != 1 and _kind(rope) != "proportional":
        raise refuse("partial_rotary_factor", value)


def _put_scaling(refuse: _Refusal, part: dict, rope: dict) -> None:
    cls, kind = refuse.cls, _kind(rope)
    if kind in ("default", "mrope"):  # for text, mrope computes the same as the default
        if has(cls, "rope_scaling") and "rope_scaling" not in part and _is_required(cls, "rope_scaling"):
            part["rope_scaling"] = None
        return
    if not has(cls, "rope_scaling"):
        if has(cls, "rope_parameters") and _read(cls, part, "rope_scaling") is not None:
            return
        if has(cls, "rope_parameters") and "rope_parameters" in part and not has(cls, "rope_theta"):
            return  # the class reads its rotary embedding from there alone
        raise refuse("rope_type", kind)
    if not part.get("rope_scaling"):
        if _read(cls, part, "rope_scaling"):
            return
        left_out = ("rope_theta", "partial_rotary_factor")
        scaling = {key: value for key, value in rope.items() if key not in left_out}
        length = part.get("original_max_position_embeddings") or part.get("max_position_embeddings")
        if kind in ("llama3", "yarn", "longrope") and length:  # transformers' default for it
            scaling.setdefault("original_max_position_embeddings", length)
        part["rope_scaling"] = scaling | {"rope_type": kind, "type": kind}
    if not _read(cls, part, "rope_scaling"):
        raise refuse("rope_type", kind)


def _is_required(cls: type, name: str) -> bool:
    return inspect.signature(cls).parameters[name].default is inspect.Parameter.empty
