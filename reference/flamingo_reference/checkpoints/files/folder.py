"""Tensors of a checkpoint as it is published: one file, or shards with an index, of safetensors or of torch's own format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from flamingo_reference.checkpoints.files.failed_downloads import refuse_stand_in
from flamingo_reference.checkpoints.files.json_file import decode_once
from flamingo_reference.checkpoints.files.safetensors_file import open_header
from flamingo_reference.checkpoints.files.tensors import CheckpointError, FileReader, TensorEntry
from flamingo_reference.checkpoints.files.torch_file import open_torch_file

INDEX_SUFFIX = ".index.json"
OPEN_CLIP_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "checkpoint.pt",
    *OPEN_CLIP_NAMES,
    "adapter_model.safetensors",
    "adapter_model.bin",
)
"""Files looked for in a folder, in this order: an adapter may lie beside the weights. Each may be shards with an index, whose name is the
file's and `.index.json`."""
TOWERS_NAME, TOWERS = "contrastive.safetensors", "contrastive."
"""The file of a contrastive encoder beside model.safetensors, and what the names of its tensors begin with."""
_ARCHIVE = b"PK\x03\x04"
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_MAX_INDEX = 100_000_000  # bytes
_MAX_NAME = 255  # bytes, of a file: what file systems allow
_SHOWN = 20  # files of a kind that a message names


def open_file(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file: of torch's format where it begins as an archive or is called so, else of safetensors.

    Raises CheckpointError if it is cut short, malformed or of another kind.
    """
    try:
        with path.open("rb") as file:
            archive = file.read(len(_ARCHIVE)) == _ARCHIVE
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Fetch it again.") from error
    refuse_stand_in(path)
    return open_torch_file(path) if archive or path.suffix in _TORCH_SUFFIXES else open_header(path)


def open_tensors(path: Path, names: Iterable[str] = NAMES, *, may_be_absent: bool = False) -> FileReader:
    """The tensors of a checkpoint: a file, or a folder with one of the files `names` or with shards and their index.

    may_be_absent: shards that the index names need not be there; their tensors are known only by name.

    Raises CheckpointError naming all files that are missing, cut short or malformed, and all tensors that are not where the index says, are
    held twice or not listed.
    """
    if path.is_file():
        return FileReader({name: (path, entry) for name, entry in open_file(path).items()})
    names = tuple(names)
    for name in names:
        index, single = path / (name + INDEX_SUFFIX), path / name
        if index.is_file():
            _refuse_two(index, single)
            return _open_shards(index, may_be_absent=may_be_absent)
        if single.is_file():
            return FileReader({tensor: (single, entry) for tensor, entry in open_file(single).items()} | _towers(single))
    raise CheckpointError(
        f"{path} has neither {names[0]} nor {names[0]}{INDEX_SUFFIX}"
        + (f" (nor {', '.join(names[1:])})" if names[1:] else "")
        + "; a checkpoint folder needs one."
    )


def _refuse_two(index: Path, single: Path) -> None:
    """Raises CheckpointError for shards beside a whole file that their index does not name: one of the two was left by an earlier save, and
    transformers would read the whole file."""
    if single.is_file() and single.name not in (named := set(_read_index(index)[0].values())):
        raise CheckpointError(
            f"{index.parent} holds {single.name} and the index of {len(named)} other files, {index.name}: two checkpoints. Remove the one "
            "that is not meant."
        )


def _towers(single: Path) -> dict[str, tuple[Path, TensorEntry]]:
    """The tensors of a contrastive encoder beside those of a model in our own format: it may be trained later, the model's file being left
    as it is. Raises CheckpointError for tensors of anything else."""
    beside = single.with_name(TOWERS_NAME)
    if single.name != NAMES[0] or not beside.is_file():
        return {}
    entries = open_file(beside)
    if foreign := [name for name in entries if not name.startswith(TOWERS)]:
        raise CheckpointError(f"{beside} holds {foreign[0]}, expected tensors of a contrastive encoder only ({TOWERS}...).")
    return {name: (beside, entry) for name, entry in entries.items()}


def _open_shards(index: Path, *, may_be_absent: bool) -> FileReader:
    weight_map, faults = _read_index(index)
    files = sorted(set(weight_map.values()))
    outside = {file for file in files if not _is_plain_name(file)}
    missing = {file for file in files if file not in outside and not (index.parent / file).is_file()}
    if outside:
        shown = ", ".join(repr(file[:80]) for file in sorted(outside)[:_SHOWN])
        faults.append(f"names what are not files of its folder: {shown}{_more(outside)}")
    if missing and not may_be_absent:
        faults.append(f"names files that are not there: {', '.join(sorted(missing)[:_SHOWN])}{_more(missing)}. Fetch them")
    absent = outside | missing
    shards, broken = _open_all(index.parent, [file for file in files if file not in absent], open_file)
    faults += broken
    owners: dict[str, list[str]] = {}
    for file, entries in shards.items():
        for name in entries:
            owners.setdefault(name, []).append(file)
    twice = {name: places for name, places in owners.items() if len(places) > 1}
    if twice:
        places = "; ".join(f"{name} in {', '.join(files)}" for name, files in sorted(twice.items()))
        faults.append(f"tensors held by more than one file: {places}. Remove the files that do not belong")
    for file, entries in shards.items():
        lost = [name for name, place in weight_map.items() if place == file and name not in entries]
        if lost:
            faults.append(
                f"{index.parent / file} does not hold {', '.join(lost)}, which the index places there. Fetch it again"
            )
    unlisted = sorted(set(owners) - set(weight_map))
    if unlisted:
        faults.append(f"the index does not list {', '.join(unlisted)}. Remove the files that do not belong")
    if faults:
        raise CheckpointError(f"{index}: " + "; ".join(faults) + ".")
    present = {name: (index.parent / file, shards[file][name]) for name, file in weight_map.items() if file not in missing}
    present |= _towers(index.with_name(index.name.removesuffix(INDEX_SUFFIX)))
    return FileReader(present, {name: index.parent / file for name, file in weight_map.items() if file in missing})


def _is_plain_name(file: str) -> bool:
    """Whether this is the name of a file in the same folder on any system: no path, nothing that cannot be a name."""
    try:
        size = len(file.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return Path(file).name == file and file not in ("", "..") and not set(file) & {"\\", "\0"} and size <= _MAX_NAME


def _more(files: Collection[str]) -> str:
    return f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""


def _open_all(
    folder: Path, files: Iterable[str], reader: Callable[[Path], dict[str, TensorEntry]]
) -> tuple[dict[str, dict[str, TensorEntry]], list[str]]:
    """The tensors of every file that can be opened, and what is wrong with the others."""
    opened: dict[str, dict[str, TensorEntry]] = {}
    faults = []
    for file in files:
        try:
            opened[file] = reader(folder / file)
        except CheckpointError as error:
            faults.append(str(error).removesuffix("."))
    return opened, faults


def _read_index(path: Path) -> tuple[dict[str, str], list[str]]:
    """Tensor name -> file name, and the tensors that it lists twice."""
    refuse_stand_in(path)
    try:
        if path.stat().st_size > _MAX_INDEX:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected at most {_MAX_INDEX}.")
        content, repeated = decode_once(path.read_bytes())
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is malformed: {error}. Fetch it again.") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, Mapping) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(
            f"{path} is malformed: expected an object weight_map of tensor names to file names. Fetch it again."
        )
    return dict(weight_map), [f"lists {', '.join(repeated)} twice"] if repeated else []
