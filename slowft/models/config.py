"""The config of a model as mlx-lm's class for it reads it: settings that it would pass over, put where it looks.

Comes in: config.json, and mlx-lm's classes. Goes out: a config that mlx-lm understands, and what was changed. A
setting that cannot be passed on is refused.
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

Classes = Callable[[dict], tuple[type[nn.Module], type]]  # a config -> mlx-lm's classes of the model and its arguments
NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
MAX_LAYERS = 2_000  # the deepest published have 126
LAYERS = re.compile(r"layers?$")
# Names in mlx-lm's classes for what transformers 5 keeps in rope_parameters.
BASE = ("rope_theta", "rotary_emb_base", "rope_freq_constant", "rope_embedding_base")
LOCAL_BASE = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta")
FRACTION = ("partial_rotary_factor", "rotary_pct", "rope_pct")
FULL, LOCAL = ("full_attention", "global_attention", "global"), ("sliding_attention", "local_attention", "local")


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model directory.

    Raises:
        ModelError: there is none, or it is something else under that name.
    """
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise ModelError(f"{path / 'config.json'} holds a {type(config).__name__}. Give a model's config.json")
    check_depth(path / "config.json", config)
    return config


def check_depth(file: Path, config: dict[str, Any]) -> None:
    """Refuse more layers than any model has: mlx-lm would make an object of each until memory is full.

    Raises:
        ModelError: names the setting.
    """
    for part in (config, *(config.get(name) for name in NESTED)):
        for name, value in part.items() if isinstance(part, dict) else ():
            if LAYERS.search(name) and isinstance(value, int | float) and value > MAX_LAYERS:
                raise ModelError(
                    f"{file}: {ascii(name[:60])} is {str(value)[:20]}, and no model has {MAX_LAYERS} "
                    "layers. Download it again"
                )


@contextlib.contextmanager
def _arguments_noted() -> Iterator[list[tuple[type, dict]]]:
    """Note which of mlx-lm's classes of arguments are made from which mapping, the model's own and nested ones."""
    from mlx_lm.models.base import BaseModelArgs

    noted: list[tuple[type, dict]] = []
    original = BaseModelArgs.__dict__["from_dict"]

    def from_dict(cls, params):
        noted.append((cls, params))
        return original.__func__(cls, params)

    BaseModelArgs.from_dict = classmethod(from_dict)
    try:
        yield noted
    finally:
        BaseModelArgs.from_dict = original


def arguments(config: dict, classes: Classes) -> list[tuple[type, dict]]:
    """(mlx-lm's class of arguments, the part of `config` that it is made from) of a model and of what it consists of.

    The class of a model that only wraps another (a text model among those for images) is left out.
    """
    model_class, args_class = classes(config)
    wraps = any(has(args_class, name) for name in NESTED)
    nested = [config[name] for name in NESTED if isinstance(config.get(name), dict)]
    with _arguments_noted() as noted, contextlib.redirect_stdout(io.StringIO()):
        with contextlib.suppress(Exception):  # what mlx-lm cannot build, it says itself later
            args = args_class.from_dict(copy.deepcopy(config))
            if wraps:
                model_class(args)  # nothing is evaluated
    found = [] if wraps else [(args_class, config)]
    for cls, params in noted:
        if cls is not args_class and not any(cls is other for other, _ in found):
            part = max(nested, key=lambda part: len(params.keys() & part.keys()), default=config)
            found.append((cls, part))
    return found


def has(cls: type, name: str) -> bool:
    return name in inspect.signature(cls).parameters


# --- Rotary embedding -------------------------------------------------------------------------------


def pass_on_rope(path: Path, config: dict, classes: Classes) -> tuple[dict, list[str]]:
    """`config` with the rotary embedding that transformers 5 describes in rope_parameters, where mlx-lm looks for it.

    Raises:
        ModelError: mlx-lm's class has no place for a value that is given.
    """
    if not any(_described(part) for part in (config, *(config.get(name) or {} for name in NESTED))):
        return config, []
    config, notes = copy.deepcopy(config), []
    for cls, part in arguments(config, classes):
        # what a text model's own part does not say, the whole one does
        if (described := _described(part) or _described(config)) is None:
            continue
        before = dict(part)
        theta, is_plain = described.get("rope_theta"), _kind(described) == "default"
        if theta is not None and not any(has(cls, name) for name in (*BASE, "rope_parameters")):
            if set(_bases(config, classes)) <= {theta}:
                continue  # it has no rotary embedding, or just that one
        kinds = set(part.get("layer_types") or ())
        if theta is not None and kinds and has(cls, "rope_parameters") and not has(cls, "rope_theta"):
            if (bases := _bases(config, classes)) and theta not in bases:
                part["rope_parameters"] = described | {kind: described for kind in sorted(kinds)}  # wanted for each
        with contextlib.redirect_stdout(io.StringIO()):
            _pass_on(path, cls, part, described)
        changed = {key: part[key] for key in part if part[key] != before.get(key) and part[key] is not None}
        if not changed:
            continue
        bases = _bases(config, classes)
        if theta is not None and is_plain and bases and theta not in bases:
            raise _Refusal(path, cls)("rope_theta", theta)  # an argument that the class takes and does not use
        given = ", ".join(f"{k} {v if not isinstance(v, dict) else _kind(v)}" for k, v in changed.items())
        notes.append(
            f"{path / 'config.json'} has its rotary embedding in rope_parameters, as transformers 5 writes it: "
            f"used as {given}; mlx-lm's own commands would take their default"
        )
    return config, notes


def _bases(config: dict, classes: Classes) -> list[float]:
    """The bases of the rotary embeddings of mlx-lm's model; of those that keep only their frequencies, none."""
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        model_class, args_class = classes(config)
        model = model_class(args_class.from_dict(copy.deepcopy(config)))
        return [m.base for n, m in model.named_modules() if re.search("rope|rotary", n) and hasattr(m, "base")]
    return []


def _described(part: dict) -> dict | None:
    """What transformers 5 says of the rotary embedding, if it says anything that older versions said elsewhere."""
    given = part.get("rope_parameters")
    if isinstance(given, dict) and given:
        return given
    scaling = part.get("rope_scaling")
    return scaling if isinstance(scaling, dict) and "rope_theta" in scaling else None


def _pass_on(path: Path, cls: type, part: dict, described: dict) -> None:
    by_layer = {key: value for key, value in described.items() if isinstance(value, dict)}
    if by_layer and has(cls, "rope_parameters"):
        return  # such a class reads it for each kind of layer
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
    """What the class makes of its argument `name`; None if it cannot be made, or leaves it out."""
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
            return  # where it is read without a name of its own
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
    if kind in ("default", "mrope"):  # mrope is the default for text
        if has(cls, "rope_scaling") and "rope_scaling" not in part and _is_required(cls, "rope_scaling"):
            part["rope_scaling"] = None
        return
    if not has(cls, "rope_scaling"):
        if has(cls, "rope_parameters") and _read(cls, part, "rope_scaling") is not None:
            return
        if has(cls, "rope_parameters") and "rope_parameters" in part and not has(cls, "rope_theta"):
            return  # a class that has its rotary embedding from there alone
        raise refuse("rope_type", kind)
    if not part.get("rope_scaling"):
        if not _read(cls, part, "rope_scaling"):
            left_out = ("rope_theta", "partial_rotary_factor")
            scaling = {key: value for key, value in rope.items() if key not in left_out}
            length = part.get("original_max_position_embeddings") or part.get("max_position_embeddings")
            if kind in ("llama3", "yarn", "longrope") and length:  # as transformers has it where it is left out
                scaling.setdefault("original_max_position_embeddings", length)
            part["rope_scaling"] = scaling | {"rope_type": kind, "type": kind}
        else:
            return
    if not _read(cls, part, "rope_scaling"):
        raise refuse("rope_type", kind)


def _is_required(cls: type, name: str) -> bool:
    return inspect.signature(cls).parameters[name].default is inspect.Parameter.empty
