"""Reading and writing checkpoints of both generations, without ever executing code from a file.

Two layouts:

* ``.pth`` / ``.pt``: ``torch.save({"ensemble_model": state_dict, "encoder_dict": {name: state_dict}})``, as the
  published code of I2MoE and FL-I2MoE writes it. Files written here add ``"config"``, a plain dict, and where the
  model has them ``"feature_means"``, one tensor (H,) per modality name.
  The published baseline, one (sparse) fusion transformer on its own, is under ``"fusion_model"``; it is read as a
  mixture of that one expert.
* ``.safetensors``: the same tensors as ``ensemble_model.<key>``, ``encoder_dict.<name>.<key>`` and
  ``feature_means.<name>``, with the configuration as JSON under ``config`` in the metadata.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from flmoe_fast.checks import ArgumentError, finite
from flmoe_fast.files import replacing
from flmoe_fast.model.config import DENSE, FLI2MoEConfig
from flmoe_fast.model.encoders import ColumnGroupEncoder, ProjectionEncoder, TabularTokenEncoder
from flmoe_fast.model.network import FLI2MoE

_TORCH_SUFFIXES = (".pth", ".pt")
_SAFETENSORS_SUFFIX = ".safetensors"

# What tells the layouts that are not read here apart: a pattern of one of their keys, and what to call them.
_OTHER_LAYOUTS = (
    (r"^experts\.\d+\.", "the ablation without interaction losses (experts.*)"),
    (r"^reweight\.weights$", "the ablation with a learned global average (reweight.weights)"),
    (r"^interaction_expert\.", "the ablation with a single expert (interaction_expert.*)"),
)
_BACKBONE_PREFIXES = ("backbone.", "vit.")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read. The message reads ``path: key: found ..., expected ...``."""

    def __init__(self, path: str | os.PathLike, key: str, found: object, expected: str):
        super().__init__(f"{os.fspath(path)}: {key}: found {found}, expected {expected}")
        self.path = Path(path)
        self.key, self.found, self.expected = key, str(found), expected


def save_checkpoint(model: FLI2MoE, path: str | os.PathLike) -> None:
    """Write a model, its configuration and its encoders.

    The file appears under its name only when it is complete; an interrupted write leaves an older file intact.

    Parameters
    ----------
    model : FLI2MoE
        Any dtype, on any device; tensors are stored on the CPU in their own dtype.
    path : path
        Ending in ``.pth``, ``.pt`` or ``.safetensors``, in an existing directory.

    Raises
    ------
    ArgumentError
        No FLI2MoE, another suffix, no such directory, or weights that are not finite.
    """
    if not isinstance(model, FLI2MoE):
        raise ArgumentError("model", type(model).__name__, "an FLI2MoE")
    path = Path(path)
    if path.suffix not in (*_TORCH_SUFFIXES, _SAFETENSORS_SUFFIX):
        raise ArgumentError("path", repr(str(path)), "a name ending in .pth, .pt or .safetensors")
    if not path.parent.is_dir():
        raise ArgumentError("path", repr(str(path)), "a path in an existing directory")
    ensemble = _stored(model.ensemble_state_dict())
    encoders = {name: _stored(encoder.state_dict()) for name, encoder in model.encoders.items()}
    config = model.config.to_dict()
    means = _stored(dict(zip(model.config.modalities, model.feature_means or [])))
    with replacing(path) as file:
        if path.suffix == _SAFETENSORS_SUFFIX:
            tensors = {f"ensemble_model.{key}": tensor for key, tensor in ensemble.items()}
            for name, state in encoders.items():
                tensors.update({f"encoder_dict.{name}.{key}": tensor for key, tensor in state.items()})
            tensors.update({f"feature_means.{name}": mean for name, mean in means.items()})
            file.write(safetensors.torch.save(tensors, {"format": "pt", "config": json.dumps(config)}))
        else:
            content = {"ensemble_model": ensemble, "encoder_dict": encoders, "config": config}
            torch.save(content | ({"feature_means": means} if means else {}), file)


def load_checkpoint(
    path: str | os.PathLike,
    *,
    config: FLI2MoEConfig | None = None,
    modalities: Sequence[str] | None = None,
    heads: int | None = None,
    temperature: float | None = None,
    task: str | None = None,
    gate: str | None = None,
    top_k: int | None = None,
    capacity: str | None = None,
    gumbel_temperature: float | None = None,
    gate_threshold: float | None = None,
) -> FLI2MoE:
    """Read a model on the CPU, in eval mode, in the dtype of the file.

    Everything that the tensors show is taken from them: the number of modalities, H, layers, classes, the shape of
    the reweighting MLP, the feed-forward multiple, the generation (position embeddings mean ``"original"``) and its
    number of tokens, the back-end and the number of networks in sparse blocks. The rest comes from the arguments, else
    from the configuration stored in the file.

    Parameters
    ----------
    path : path
        ``.safetensors``, or any other name for a file of ``torch.save``. Such a file is unpickled with
        ``weights_only=True``; one that contains code is refused and nothing of it runs.
    config : FLI2MoEConfig, optional
        Used instead of the stored configuration; must agree with the tensors. Excludes the arguments below.
    modalities : sequence of str, optional
        Names in the order of the concatenated sequence.
    heads : int, optional
        Attention heads.
    temperature : float, optional
        Of the routing softmax.
    task : str, optional
        ``"multiclass"`` or ``"multilabel"``.
    gate : str, optional
        ``"naive"``, ``"gshard"`` or ``"switch"``, which look the same in a file with sparse blocks.
    top_k : int, optional
        Networks a token uses, for ``"naive"`` and ``"noisy"`` gates.
    capacity : str, optional
        See :class:`FLI2MoEConfig`; ``"none"`` unless the file or this says otherwise.
    gumbel_temperature, gate_threshold
        Of InterpretCC gates.

    Returns
    -------
    FLI2MoE
        A model with encoders when the file has a readable one for each modality: ``proj.*`` becomes a
        :class:`ProjectionEncoder` (frozen ``backbone.*`` and ``vit.*`` weights beside it are left out, so it takes the
        backbone's output), ``feature_emb`` and ``bias`` a :class:`TabularTokenEncoder`, or a
        :class:`ColumnGroupEncoder` where there are fewer tokens than columns. Otherwise a model without encoders, and a
        warning if the file has encoders that could not be used.

    Raises
    ------
    CheckpointError
        No such file, a damaged file, a file with code in it, another layout, missing or unexpected keys, wrong shapes,
        mixed dtypes, non-finite weights, or a configuration that contradicts the tensors.
    ArgumentError
        Something that the file does not tell has to be passed; the message names it.
    """
    given = {"modalities": modalities, "heads": heads, "temperature": temperature, "task": task}
    given |= {"gate": gate, "top_k": top_k, "capacity": capacity}
    given |= {"gumbel_temperature": gumbel_temperature, "gate_threshold": gate_threshold}
    given = {name: value for name, value in given.items() if value is not None}
    if config is not None and not isinstance(config, FLI2MoEConfig):
        raise ArgumentError("config", type(config).__name__, "an FLI2MoEConfig")
    if config is not None and given:
        raise ArgumentError(next(iter(given)), "a value beside config", "either config or single arguments")
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(path, "file", "nothing" if not path.exists() else "no regular file", "a checkpoint")
    read = _read_safetensors if path.suffix == _SAFETENSORS_SUFFIX else _read_torch
    return _build(path, read(path), config, given)


def model_from_state(state: Mapping[str, Tensor], source: str, **given: Any) -> FLI2MoE:
    """A model with copies of the weights of an ensemble's state dict, on the CPU, in eval mode, without encoders.

    Parameters
    ----------
    state : mapping from str to Tensor
        With the keys of :meth:`FLI2MoE.ensemble_state_dict`.
    source : str
        What the state dict is of, for messages.
    **given
        What the state dict does not tell, as for :func:`load_checkpoint`.

    Raises
    ------
    CheckpointError
        Another layout, missing or unexpected keys, wrong shapes, mixed dtypes, non-finite weights.
    ArgumentError
        A bad argument.
    """
    return _build(Path(source), _States(dict(state), {}, None, {}), None, given)


def _build(path: Path, states: _States, config: FLI2MoEConfig | None, given: Mapping[str, Any]) -> FLI2MoE:
    """The model of what a file holds."""
    ensemble, encoder_states, stored, means, single = states
    if single:
        given = {"temperature": 1.0, **given, "roles": (DENSE,), "routing": "average"}
    _refuse_other_layouts(path, ensemble)
    derived = _derive(path, ensemble)
    config = config or _complete(path, derived, stored, given, encoder_states)
    _compare(path, derived, config)
    ensemble = _first_router(path, ensemble)

    encoders, own_states = _encoders(path, config, encoder_states)
    with torch.device("meta"):  # shapes only: nothing is initialised, and no random numbers are drawn
        model = FLI2MoE(config, {name: build() for name, build in encoders.items()})
    tensors = dict(ensemble)
    for name, state in own_states.items():
        tensors.update({f"encoders.{name}.{key}": tensor for key, tensor in state.items()})
    dtype = _check_tensors(path, model, tensors)
    model = model.to_empty(device="cpu").to(dtype)
    model.load_state_dict(tensors, strict=True)
    model.feature_means = _feature_means(path, config, means, dtype)
    return model.eval()


def load_weights(model: FLI2MoE, path: str | os.PathLike) -> None:
    """Give a model the weights and feature means of a file that :func:`save_checkpoint` wrote of the same model.

    Unlike :func:`load_checkpoint` it makes no model, so the encoders may be of any kind.

    Raises
    ------
    CheckpointError
        As :func:`load_checkpoint`, or weights of a model of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(path, "file", "nothing", "a checkpoint")
    read = _read_safetensors if path.suffix == _SAFETENSORS_SUFFIX else _read_torch
    found = read(path)
    tensors = dict(found.ensemble)
    for name, state in found.encoders.items():
        tensors.update({f"encoders.{name}.{key}": tensor for key, tensor in state.items()})
    _check_tensors(path, model, tensors)
    model.load_state_dict(tensors, strict=True)
    parameter = next(model.parameters())
    means = _feature_means(path, model.config, found.feature_means, parameter.dtype)
    model.feature_means = None if means is None else [mean.to(parameter.device) for mean in means]


def _feature_means(
    path: Path, config: FLI2MoEConfig, means: Mapping[str, Tensor], dtype: torch.dtype
) -> list[Tensor] | None:
    if not means:
        return None
    if set(means) != set(config.modalities):
        raise CheckpointError(path, "feature_means", f"{_some(means)}", f"one for each modality {config.modalities}")
    for name, mean in means.items():
        if tuple(mean.shape) != (config.hidden,) or not bool(torch.isfinite(mean).all()):
            found = f"shape {tuple(mean.shape)}, or values that are not finite"
            raise CheckpointError(path, f"feature_means.{name}", found, f"({config.hidden},) finite numbers")
    return [means[name].to(dtype).clone() for name in config.modalities]


def _stored(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for key, tensor in state.items():
        if tensor.is_floating_point():
            finite(key, tensor)
    return {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}


class _States(NamedTuple):
    """What a file holds."""

    ensemble: dict[str, Tensor]
    encoders: dict[str, dict[str, Tensor]]
    config: Any
    feature_means: dict[str, Tensor]
    single: bool = False


def _read_torch(path: Path) -> _States:
    try:
        # Mapped files are read only where tensors are used, which spares frozen backbones; old ones cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        found = f"objects other than tensors and plain containers, or a damaged file (refused unexecuted: {first})"
        raise CheckpointError(path, "file", found, "a file of torch.save with nothing but tensors") from error
    except Exception as error:
        found = f"a damaged or truncated file ({type(error).__name__}: {error})"
        raise CheckpointError(path, "file", found, "a complete file of torch.save") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(path, "file", f"a {type(content).__name__}", "a dict with the key ensemble_model")
    single = "fusion_model" in content and "ensemble_model" not in content
    if "ensemble_model" not in content and not single:
        found = f"keys {_some(content)}"
        if any(str(key).startswith(("reweight.", "interaction_experts.")) for key in content):
            found = "a bare state dict"
        raise CheckpointError(path, "file", found, 'a dict {"ensemble_model": ..., "encoder_dict": ...}')
    if single:
        ensemble = _alone(path, _state(path, "fusion_model", content["fusion_model"]))
    else:
        ensemble = _state(path, "ensemble_model", content["ensemble_model"])
    encoders = content.get("encoder_dict", {})
    if not isinstance(encoders, Mapping):
        raise CheckpointError(path, "encoder_dict", f"a {type(encoders).__name__}", "a dict of state dicts")
    encoders = {str(name): _state(path, f"encoder_dict.{name}", state) for name, state in encoders.items()}
    means = _state(path, "feature_means", content.get("feature_means", {}))
    return _States(ensemble, encoders, content.get("config"), means, single)


def _alone(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A fusion transformer on its own as the only expert of a mixture."""
    heads = [key for key in state if re.fullmatch(r"network\.\d+\.fc\.weight", key)]
    if len(heads) != 1:
        raise CheckpointError(path, "fusion_model", f"keys {_some(state)}", "a fusion transformer (network.*)")
    weight = _tensor(path, state, heads[0], 2)
    routing = {"weight": weight.new_zeros(1, weight.shape[1]), "bias": weight.new_zeros(1)}
    ensemble = {f"reweight.mlp.network.0.{name}": tensor for name, tensor in routing.items()}
    return ensemble | {f"interaction_experts.0.fusion_model.{key}": tensor for key, tensor in state.items()}


def _state(path: Path, key: str, state: object) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise CheckpointError(path, key, f"a {type(state).__name__}", "a state dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(path, f"{key}.{name}", f"a {type(tensor).__name__}", "a tensor under a string")
    return dict(state)


def _read_safetensors(path: Path) -> _States:
    ensemble: dict[str, Tensor] = {}
    encoders: dict[str, dict[str, Tensor]] = {}
    means: dict[str, Tensor] = {}
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            for key in file.keys():
                top, _, rest = key.partition(".")
                name, _, inner = rest.partition(".")
                if top == "ensemble_model" and rest:
                    ensemble[rest] = file.get_tensor(key)
                elif top == "encoder_dict" and inner:
                    state = encoders.setdefault(name, {})
                    if not inner.startswith(_BACKBONE_PREFIXES):
                        state[inner] = file.get_tensor(key)
                elif top == "feature_means" and rest:
                    means[rest] = file.get_tensor(key)
                else:
                    expected = "ensemble_model.*, encoder_dict.<name>.* or feature_means.<name>"
                    raise CheckpointError(path, key, "this key", expected)
    except safetensors.SafetensorError as error:
        found = f"a damaged or truncated file ({error})"
        raise CheckpointError(path, "file", found, "a complete safetensors file") from error
    if "config" not in metadata:
        return _States(ensemble, encoders, None, means)
    try:
        return _States(ensemble, encoders, json.loads(metadata["config"]), means)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, "config", f"no JSON ({error})", "the configuration as JSON") from error


def _refuse_other_layouts(path: Path, ensemble: Mapping[str, Tensor]) -> None:
    expected = "reweight.mlp.* and interaction_experts.{e}.fusion_model.*"
    for pattern, name in _OTHER_LAYOUTS:
        for key in ensemble:
            if re.search(pattern, key):
                raise CheckpointError(path, key, f"the layout of {name}", expected)


def _derive(path: Path, ensemble: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the shape of the model off the tensors; the keys are then compared one by one with a model so built."""
    prefix = "interaction_experts.0.fusion_model."
    fusion = "transformer"
    if any(key.startswith(prefix + "modality_gates.") for key in ensemble):
        fusion = "interpretcc"
    elif any(key.startswith(prefix + "layers.") for key in ensemble):
        fusion = "moepp"
    first = {"interpretcc": "modality_gates.0.0.bias", "moepp": "layers.0.norm1.weight"}
    hidden = _tensor(path, ensemble, prefix + first.get(fusion, "network.0.norm1.weight"), 1).shape[0]
    routing = _tensor(path, ensemble, "reweight.mlp.network.0.weight", 2)
    if hidden == 0 or routing.shape[1] == 0 or routing.shape[1] % hidden:
        found = f"shape {tuple(routing.shape)}"
        raise CheckpointError(path, "reweight.mlp.network.0.weight", found, f"a multiple of H = {hidden} columns")
    count = routing.shape[1] // hidden
    experts = _indices(path, ensemble, r"^interaction_experts\.(\d+)\.", "interaction_experts")
    matches = (re.fullmatch(r"reweight\.mlp\.network\.(\d+)\.weight", key) for key in ensemble)
    linears = sorted(int(match[1]) for match in matches if match)
    if linears != list(range(0, 3 * len(linears), 3)):
        raise CheckpointError(path, "reweight.mlp.network", f"linear layers at {linears}", "layers at 0, 3, 6, ...")
    derived = {"modalities": count, "experts": experts, "fusion": fusion, "hidden": hidden}
    derived["reweight_layers"] = len(linears)
    if len(linears) > 1:
        derived["reweight_hidden"] = routing.shape[0]
    if fusion == "interpretcc":
        classes = _tensor(path, ensemble, prefix + "classifier.2.weight", 2).shape[0]
        return derived | {"classes": classes, "generation": "original", "num_tokens": (1,) * count}
    derived["generation"] = "original" if any(key.endswith(".pos_embed") for key in ensemble) else "fl"
    if derived["generation"] == "original":
        positions = _tensor(path, ensemble, prefix + "pos_embed", 3).shape[1]
        if positions == 0 or positions % count:
            found = f"{positions} positions"
            raise CheckpointError(path, prefix + "pos_embed", found, f"the same number for each of {count} modalities")
        derived["num_tokens"] = (positions // count,) * count
    shape_of = _derive_moepp if fusion == "moepp" else _derive_transformer
    return derived | shape_of(path, ensemble, prefix, hidden)


def _derive_moepp(path: Path, ensemble: Mapping[str, Tensor], prefix: str, hidden: int) -> dict[str, Any]:
    return {
        "layers": _indices(path, ensemble, "^" + re.escape(prefix) + r"layers\.(\d+)\.", prefix + "layers"),
        "classes": _tensor(path, ensemble, prefix + "classification_head.fc.weight", 2).shape[0],
        "ffn_experts": _tensor(path, ensemble, prefix + "layers.0.mlp.moe.gate.gate_map.weight", 2).shape[0],
    }


def _derive_transformer(path: Path, ensemble: Mapping[str, Tensor], prefix: str, hidden: int) -> dict[str, Any]:
    # The classification head is the last entry of the network.
    layers = _indices(path, ensemble, "^" + re.escape(prefix) + r"network\.(\d+)\.", prefix + "network") - 1
    derived: dict[str, Any] = {"layers": layers}
    derived["classes"] = _tensor(path, ensemble, f"{prefix}network.{layers}.fc.weight", 2).shape[0]
    key, axis = prefix + "network.0.mlp.network.0.weight", 0
    if key not in ensemble and any(name.startswith(prefix + "network.0.mlp.experts.") for name in ensemble):
        key, axis = prefix + "network.0.mlp.experts.htoh4.weight", 1
    widened = _tensor(path, ensemble, key, 2 + axis).shape
    if axis:
        derived["ffn_experts"] = widened[0]
        if prefix + "network.0.mlp.gate.w_gate" in ensemble:
            derived["gate"] = "noisy"
    if widened[axis] == 0 or widened[axis] % hidden:
        raise CheckpointError(path, key, f"shape {tuple(widened)}", f"a multiple of H = {hidden} rows")
    return derived | {"ffn_multiple": widened[axis] // hidden}


def _tensor(path: Path, ensemble: Mapping[str, Tensor], key: str, dimensions: int) -> Tensor:
    if key not in ensemble:
        raise CheckpointError(path, key, f"no such key (but {_some(ensemble)})", "a checkpoint of experts")
    if ensemble[key].dim() != dimensions:
        raise CheckpointError(path, key, f"shape {tuple(ensemble[key].shape)}", f"{dimensions} dimensions")
    return ensemble[key]


def _indices(path: Path, ensemble: Mapping[str, Tensor], pattern: str, key: str) -> int:
    # Numbers must run from 0 without gaps, so that a stray one cannot ask for a model larger than the file.
    found = sorted({int(match[1]) for name in ensemble if (match := re.match(pattern, name))})
    if found != list(range(len(found))):
        raise CheckpointError(path, key, f"numbers {found}", f"0 to {len(found) - 1}")
    return len(found)


def _complete(
    path: Path,
    derived: Mapping[str, Any],
    stored: Any,
    given: Mapping[str, Any],
    encoder_states: Mapping[str, object],
) -> FLI2MoEConfig:
    if stored is not None:
        try:
            fields = FLI2MoEConfig.from_dict(stored).to_dict()
        except ArgumentError as error:
            raise CheckpointError(path, "config", f"a bad configuration ({error})", "that of an FLI2MoE") from error
        config = FLI2MoEConfig.from_dict({**fields, **given})
        for name, value in given.items():
            if (list(value) if isinstance(value, tuple) else value) != fields[name]:
                text = f"{path} was saved with {name} {fields[name]!r}; with {value!r} it is another model"
                warnings.warn(text, stacklevel=4)
        return config
    count, experts = derived["modalities"], derived["experts"]
    if experts != count + 2 and "roles" not in given:
        found = f"{experts} experts"
        if experts == 2:
            found += ", the layout of the ablation with synergy and redundancy only"
        expected = f"M + 2 = {count + 2} for the {count} modalities, or a configuration that says which they are"
        raise CheckpointError(path, "interaction_experts", found, expected)
    needed = ["modalities", "heads", "temperature", "task"]
    if derived["fusion"] == "interpretcc":
        needed[1:2] = ["gumbel_temperature", "gate_threshold"]
    elif derived["fusion"] == "transformer" and "ffn_experts" in derived:
        needed += ["gate"] if "gate" not in derived else []
        needed += ["top_k"] if given.get("gate", derived.get("gate")) in ("naive", "noisy") else []
    missing = [name for name in needed if name not in given]
    if missing:
        got = f"nothing for {', '.join(missing)}, and {path} stores no configuration"
        names = f"; its encoders are named {sorted(encoder_states)}" if encoder_states else ""
        raise ArgumentError(missing[0], got, f"all of {', '.join(missing)} as arguments{names}")
    names = given["modalities"]
    if isinstance(names, str) or len(names) != derived["modalities"]:
        raise ArgumentError("modalities", repr(names), f"{derived['modalities']} names, as {path} has that many")
    # InterpretCC has neither heads nor layers; a configuration has to have some.
    fields = {"heads": 1, "layers": 1} | {name: value for name, value in derived.items() if name != "experts"}
    return FLI2MoEConfig(**{**fields, **given, "modalities": tuple(names)})


def _compare(path: Path, derived: Mapping[str, Any], config: FLI2MoEConfig) -> None:
    for name, found in derived.items():
        wanted = len(config.modalities) if name == "modalities" else getattr(config, name)
        if found != wanted:
            raise CheckpointError(path, name, f"{found!r} in the tensors", f"{wanted!r} from the configuration")


def _first_router(path: Path, ensemble: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those of routers that never route.

    A sparse block lists its router twice, as ``gate`` and as the first of ``all_gates``, whose others are not used.
    """
    kept = {}
    for key, tensor in ensemble.items():
        match = re.fullmatch(r"(.*\.mlp\.)all_gates\.(\d+)\.(.*)", key)
        if match and match[2] != "0":
            continue
        twin = ensemble.get(f"{match[1]}gate.{match[3]}", tensor) if match else tensor
        # Wrong shapes and values that are not finite are told apart later.
        if tensor.shape == twin.shape and not torch.equal(tensor.nan_to_num(), twin.nan_to_num()):
            raise CheckpointError(path, key, "other values than in mlp.gate", "the same router under both names")
        kept[key] = tensor
    return kept


def _encoders(
    path: Path, config: FLI2MoEConfig, encoder_states: Mapping[str, Mapping[str, Tensor]]
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Constructors and state dicts of the encoders, both empty unless every modality has a readable one."""
    if not encoder_states:
        return {}, {}
    if set(encoder_states) != set(config.modalities):
        found = f"encoders named {sorted(encoder_states)}"
        raise CheckpointError(path, "encoder_dict", found, f"one for each modality {config.modalities}")
    builders: dict[str, Any] = {}
    states, unread = {}, []
    for name in config.modalities:
        state = {k: v for k, v in encoder_states[name].items() if not k.startswith(_BACKBONE_PREFIXES)}
        key = f"encoder_dict.{name}"
        if set(state) == {"proj.weight", "proj.bias"}:
            width = _encoder_width(path, f"{key}.proj.weight", state["proj.weight"], 1)
            builders[name] = lambda width=width: ProjectionEncoder(width, config.hidden)
        elif set(state) == {"feature_emb", "bias"}:
            columns = _encoder_width(path, f"{key}.feature_emb", state["feature_emb"], 0)
            tokens = _encoder_width(path, f"{key}.bias", state["bias"], 0)
            if tokens >= columns:  # a token each; what more there is does not fit, and is refused by its shape
                builders[name] = lambda c=columns: TabularTokenEncoder(c, config.hidden)
            else:
                builders[name] = lambda c=columns, t=tokens: ColumnGroupEncoder(c, t, config.hidden)
        else:
            unread.append(f"{name} ({_some(encoder_states[name])})")
        states[name] = state
    if unread:
        message = f"{path}: no encoders loaded, because these are of no known kind: {', '.join(unread)}"
        warnings.warn(message, stacklevel=3)
        return {}, {}
    return builders, states


def _encoder_width(path: Path, key: str, tensor: Tensor, axis: int) -> int:
    if tensor.dim() != 2 or tensor.shape[axis] == 0:
        raise CheckpointError(path, key, f"shape {tuple(tensor.shape)}", "a matrix")
    return tensor.shape[axis]


def _check_tensors(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> torch.dtype:
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items()}
    missing, unexpected = [k for k in wanted if k not in tensors], [k for k in tensors if k not in wanted]
    if missing:
        found = "no such key" + (f", nor {len(missing) - 1} others" if len(missing) > 1 else "")
        raise CheckpointError(path, _in_file(missing[0]), found, "a complete state dict")
    if unexpected:
        found = f"{len(unexpected)} unexpected keys: {_some(unexpected)}"
        raise CheckpointError(path, _in_file(unexpected[0]), found, "only keys of the model")
    dtype = next(iter(tensors.values())).dtype
    for key, tensor in tensors.items():
        name = _in_file(key)
        if tensor.shape != wanted[key]:
            raise CheckpointError(path, name, f"shape {tuple(tensor.shape)}", f"shape {tuple(wanted[key])}")
        if tensor.dtype not in _DTYPES or tensor.dtype != dtype or tensor.layout != torch.strided:
            expected = "dense floating-point tensors, all of one dtype"
            raise CheckpointError(path, name, f"{tensor.dtype}, {tensor.layout}", f"{expected} (the first is {dtype})")
        # Strides of zero let a few stored bytes claim any amount of memory.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(path, name, "fewer stored values than its shape needs", "one value per entry")
        wrong = int((~torch.isfinite(tensor)).sum())
        if wrong:
            raise CheckpointError(path, name, f"{wrong} values that are NaN or infinite", "finite weights")
    return dtype


def _in_file(key: str) -> str:
    """The model's key as the file spells it."""
    return key.replace("encoders.", "encoder_dict.", 1) if key.startswith("encoders.") else key


def _some(keys: Mapping | Sequence, most: int = 4) -> str:
    keys = [str(key) for key in keys]
    return ", ".join(keys[:most]) + (f", ... ({len(keys)} in all)" if len(keys) > most else "")
