"""`flamingo_export.evaluate`: a task put to a model, few-shot, as the paper does it; resumable; beside another model where one is named."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flamingo_export.errors import EvaluationError, FlamingoExportError
from flamingo_export.evaluation.asking import Interview
from flamingo_export.evaluation.bundles import BundleModel
from flamingo_export.evaluation.evaluation_page import write_page
from flamingo_export.evaluation.items import Data, read_data
from flamingo_export.evaluation.metrics.registry import metric_of
from flamingo_export.evaluation.predictions import Prediction, PredictionFile, Unit, read_predictions
from flamingo_export.evaluation.protocol import EvaluatedModel, HasFeatures
from flamingo_export.evaluation.results import (
    AGAINST_FILE,
    PREDICTIONS_FILE,
    RESULTS_FILE,
    Results,
    cells_of,
    costs_of,
    paper_of,
    write_results,
)
from flamingo_export.evaluation.selection import Selector, Similarity, medium_key
from flamingo_export.evaluation.settings import Settings
from flamingo_export.evaluation.task import ZERO_SHOT_TEXTS, Item, Task
from flamingo_export.evaluation.tasks import task_of
from flamingo_export.files import exclusive
from flamingo_export.progress import SILENT, Progress
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.videos import Video

if TYPE_CHECKING:
    from flamingo_export.runtime.model import Model

EXAMPLES_INDEX = "examples.index"


def evaluate(
    model: EvaluatedModel | Model,
    task: Task | str | Path,
    *,
    data: Path | str | None = None,
    support: Path | str | None = None,
    split: str | None = None,
    settings: Settings | None = None,
    against: EvaluatedModel | Model | Path | str | None = None,
    index: Path | str | None = None,
    out: Path | str | None = None,
    overwrite: bool = False,
    skip_missing: bool = False,
    report: bool = True,
    progress: Progress = SILENT,
) -> Results:
    """Scores of a model on a task, few-shot.

    model: a loaded bundle, or anything that follows `evaluation.protocol.EvaluatedModel`.
    task: a name of `evaluation.tasks.NAMES`, a TOML file, or a Task.
    data: the folder with the task's published files; for a task of one's own the file of items.
    support: another folder or file that examples come from. split: another one than the task's.
    settings: shots, how they are chosen, the seed and so on.
    against: another model, asked the same items with the same examples; or the folder of an earlier run of the same task and settings.
    index: a folder that `index` wrote of the examples, for RICES; without one they are encoded first.
    out: where predictions, results and the page are written; an interrupted run is resumed there. None keeps nothing.
    overwrite: what another run left in `out` is removed. skip_missing: items whose media are gone are left out and counted.
    report: whether the page is written.

    Raises EvaluationError (data, settings, a metric that lacks its tool) and InputError (prompts that cannot fit) before anything is run.
    """
    chosen = task if isinstance(task, Task) else task_of(task)
    settings = settings or Settings()
    settings.check(chosen)
    metric = metric_of(chosen.metric)
    metric.require()
    first = as_evaluated(model)
    progress.stage("reading the data", 1)
    found = read_data(chosen, settings, data, support, split, skip_missing=skip_missing)
    progress.advance(1)
    second = None if against is None or isinstance(against, str | Path) else as_evaluated(against)
    asked_models = [first] if second is None else [first, second]
    if settings.select == "rices" and isinstance(first, HasFeatures):
        # An index may take hours, so what fails for want of room or of examples is said before it is made.
        _check_before_the_index(asked_models, found, settings, chosen)
    with _workplace(out, overwrite) as folder:
        similarity, features = _similarity(first, found, settings, index, folder, progress, overwrite=overwrite)
        selector = Selector(found.examples, settings.select, settings.seed, similarity) if settings.needs_examples() else None
        if selector is not None:
            selector.check(found.queries, _most_examples(settings))
            progress.stage("examples", 1)
            selector.prepare(found.queries)
            progress.advance(1)
        interview = Interview(chosen, settings, selector, {item.id: item for item in found.queries})
        units = units_of(found.queries, settings)
        identity = _identity(chosen, settings, found, features)
        others, other_identity = None, None
        if isinstance(against, str | Path):
            others, other_identity = _earlier(Path(against), identity, units)
        for each in asked_models:
            _check_longest(each, interview, found.queries, settings, chosen)
        predictions = _predictions(first, interview, units, folder / PREDICTIONS_FILE, identity, progress)
        if second is not None:
            others = _predictions(second, interview, units, folder / AGAINST_FILE, identity, progress)
            other_identity = dict(second.identity)
        progress.stage("scores", 1)
        cells, scored = cells_of(metric, settings, found.queries, predictions, others)
        results = Results(
            task=chosen.name,
            title=chosen.title,
            metric=metric.title,
            unit=metric.unit,
            mode=chosen.mode,
            split=found.split,
            paper_split=chosen.paper_split,
            settings=settings,
            model=dict(first.identity),
            against=other_identity,
            version=identity["version"],
            data=identity["data"],
            features=features,
            left_out=found.left_out,
            cells=tuple(cells),
            paper=paper_of(chosen),
            costs=costs_of(predictions),
        )
        write_results(folder, results, found.queries, scored)
        if report and out is not None:
            write_page(folder, results, found, predictions, others, scored)
        progress.advance(1)
    return results


def as_evaluated(model: EvaluatedModel | Model) -> EvaluatedModel:
    """A loaded bundle behind the protocol; what follows it already stays as it is."""
    from flamingo_export.runtime.model import Model

    return BundleModel(model) if isinstance(model, Model) else model


def units_of(queries: Sequence[Item], settings: Settings) -> list[Unit]:
    """Items that run together, for each number of shots."""
    ids = [item.id for item in queries]
    size = settings.unit
    return [
        Unit(shots=shots, number=number, ids=tuple(ids[start : start + size]))
        for shots in settings.shots
        for number, start in enumerate(range(0, len(ids), size))
    ]


def _similarity(
    model: EvaluatedModel,
    data: Data,
    settings: Settings,
    index: Path | str | None,
    folder: Path,
    progress: Progress,
    *,
    overwrite: bool,
) -> tuple[Similarity | None, str]:
    """What RICES goes by, and what its features are. overwrite: the run's own index, not one that was given, may be of something else."""
    if settings.select != "rices" or not any(settings.shots) or not isinstance(model, HasFeatures):
        return None, ""
    from flamingo_export.evaluation.index.similarity import IndexedSimilarity, index_of

    place = Path(index) if index is not None else folder / EXAMPLES_INDEX
    made = index_of(model, data.examples, place, overwrite=overwrite and index is None, progress=progress)
    return IndexedSimilarity(model, made), model.features_of


def _most_examples(settings: Settings) -> int:
    return max((*settings.shots, ZERO_SHOT_TEXTS if 0 in settings.shots else 0))


def _check_before_the_index(models: Sequence[EvaluatedModel], data: Data, settings: Settings, task: Task) -> None:
    """Raises EvaluationError where there are too few examples, InputError where not even those of the shortest texts fit, each with its medium.

    Similar examples show as many media, and their texts are at least as long.
    """
    most = _most_examples(settings)
    Selector(data.examples, "random", settings.seed).check(data.queries, most)
    by_pool: dict[str, dict[object, Item]] = {}
    for item in sorted(data.examples, key=lambda each: len(each.question or "") + len(each.answer)):
        media = by_pool.setdefault(item.pool, {})
        if len(media) <= most:  # one to spare: a query's own medium is left out
            media.setdefault(medium_key(item), item)
    few = [item for item in data.queries[: settings.unit] if len(by_pool.get(item.pool, ())) > most]
    if not few:
        return
    shortest = Selector([item for media in by_pool.values() for item in media.values()], "shared", settings.seed)
    interview = Interview(task, settings, shortest, {item.id: item for item in few})
    for each in models:
        _check_longest(each, interview, few, settings, task)


def _check_longest(
    model: EvaluatedModel, interview: Interview, queries: Sequence[Item], settings: Settings, task: Task
) -> None:
    """Raises InputError before any work if the longest prompts cannot fit. Prompts of all items are made, which also finds texts that cannot."""
    shots = max(settings.shots)
    requests: list[Request] = []
    for item in queries:
        requests += interview.asked(model, item, shots).requests
    beams, new_tokens = (1, 1) if task.mode == "closed" else (settings.beams, settings.new_tokens(task))
    model.check(requests, beams=beams, max_new_tokens=new_tokens)


def _identity(task: Task, settings: Settings, data: Data, features: str) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "task": task.name,
        "metric": task.metric,
        "split": data.split,
        "settings": msgspec.to_builtins(settings),
        "data": _digest(data.queries, data.examples),
        "features": features,
        "version": version("flamingo-export"),
    }


def _digest(*lists: Sequence[Item]) -> str:
    """Of all that items say, and the names of what they show."""
    digest = hashlib.sha256()
    for items in lists:
        for item in items:
            medium = item.medium.source if isinstance(item.medium, Video) else item.medium
            clip = item.medium.clip if isinstance(item.medium, Video) else None
            name = Path(medium).name if isinstance(medium, str | Path) else type(medium).__name__
            content = (
                item.id,
                name,
                clip,
                item.references,
                item.answer,
                item.question,
                item.candidates,
                item.relevance,
                item.groups,
            )
            digest.update(repr(content).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


def _predictions(
    model: EvaluatedModel,
    interview: Interview,
    units: Sequence[Unit],
    path: Path,
    identity: Mapping[str, Any],
    progress: Progress,
) -> dict[int, list[Prediction]]:
    """Predictions by shots, those that an interrupted run left and the rest."""
    file = PredictionFile(path, units, {**identity, "model": dict(model.identity)})
    shots = None
    for unit in units[file.finished_units :]:
        if unit.shots != shots:
            shots = unit.shots
            progress.stage(
                f"{model.identity.get('name', 'model')}, {shots} shots",
                sum(len(each.ids) for each in units if each.shots == shots),
            )
            progress.advance(sum(each.shots == shots for each in file.done))
        file.append(interview.predictions(model, unit))
        progress.advance(len(unit.ids))
    return _by_shots(file.done)


def _by_shots(predictions: Sequence[Prediction]) -> dict[int, list[Prediction]]:
    found: dict[int, list[Prediction]] = {}
    for each in predictions:
        found.setdefault(each.shots, []).append(each)
    return found


def _earlier(
    folder: Path, identity: Mapping[str, Any], units: Sequence[Unit]
) -> tuple[dict[int, list[Prediction]], dict[str, str]]:
    """The predictions of an earlier run. Raises EvaluationError if it was of another task, data or settings."""
    found, predictions = read_predictions(folder / PREDICTIONS_FILE)
    model = found.pop("model", {})
    mine, theirs = ({key: value for key, value in each.items() if key != "version"} for each in (identity, found))
    if differing := [
        key for key in sorted({*mine, *theirs}) if msgspec.json.encode(mine.get(key)) != msgspec.json.encode(theirs.get(key))
    ]:
        raise EvaluationError(
            f"{folder} is of another run: {', '.join(differing)} differ. Pairs are compared on the same items and examples."
        )
    wanted = [(unit.shots, name) for unit in units for name in unit.ids]
    if [(each.shots, each.id) for each in predictions] != wanted:
        raise EvaluationError(f"{folder} is of a run that has not ended; run its eval command again to finish it")
    return _by_shots(predictions), {str(key): str(value) for key, value in model.items()}


@contextmanager
def _workplace(out: Path | str | None, overwrite: bool) -> Iterator[Path]:
    """The folder of a run, locked; a temporary one where nothing is to be kept."""
    if out is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise EvaluationError(f"{folder} is a file; --out names a folder")
    ours = {".lock", EXAMPLES_INDEX}
    if folder.is_dir() and not (folder / PREDICTIONS_FILE).exists() and any(path.name not in ours for path in folder.iterdir()):
        raise EvaluationError(f"{folder} holds files that do not belong to an evaluation. Give another --out.")

    def busy(pid: str) -> FlamingoExportError:
        return EvaluationError(f"another process ({pid}) is evaluating into {folder}")

    def unwritable(error: OSError) -> FlamingoExportError:
        return EvaluationError(f"{folder} cannot be written: {error.strerror}")

    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / ".lock", busy=busy, unwritable=unwritable):
        if overwrite:
            for name in (PREDICTIONS_FILE, AGAINST_FILE, RESULTS_FILE):
                (folder / name).unlink(missing_ok=True)
        yield folder
