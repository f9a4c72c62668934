"""CIDEr by pycocoevalcap: Stanford's PTB tokenizer in Java, then TF-IDF n-grams over the references of all items that are scored."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flamingo_export.errors import EvaluationError, pip_install
from flamingo_export.evaluation.metrics.base import Mean, Outcome
from flamingo_export.evaluation.task import Item

_INSTALL = f"Install it: {pip_install('eval')}"


class Cider:
    """CIDEr-D times 100, as the paper and the COCO server give it (Vedantam et al. 2015, arXiv 1411.5726)."""

    title, unit = "CIDEr", ""

    def require(self) -> None:
        """Raises EvaluationError where pycocoevalcap or Java is missing."""
        try:
            import pycocoevalcap.cider.cider
            import pycocoevalcap.tokenizer.ptbtokenizer  # noqa: F401
        except ImportError as error:
            raise EvaluationError(f"CIDEr needs pycocoevalcap ({error}). {_INSTALL}") from None
        if shutil.which("java") is None:
            raise EvaluationError(
                "CIDEr's tokenizer is a Java program and there is no java on the PATH. Install one: apt-get install default-jre-headless, "
                "or https://adoptium.net. Scores by another tokenizer could not be compared with published ones, so none is taken instead."
            )

    def score(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Mean:
        """Of each item; its n-grams' weights depend on the references of all of them.

        Raises EvaluationError if the tokenizer fails.
        """
        from pycocoevalcap.cider.cider import Cider as Official

        texts = [text for item in items for text in item.references] + [outcome.text for outcome in outcomes]
        tokens = iter(tokenised(texts))
        references = {index: [next(tokens) for _ in item.references] for index, item in enumerate(items)}
        candidates = {index: [next(tokens)] for index in range(len(items))}
        _, scores = Official().compute_score(references, candidates)
        return Mean(items=100.0 * np.asarray(scores, np.float64))


def tokenised(texts: Sequence[str]) -> list[str]:
    """Each text in lower-case PTB tokens joined by blanks, punctuation left out, as pycocoevalcap's tokenizer gives it.

    Its jar is run on a file of ours: the package writes into its own folder, which an installation may not allow, and in the machine's
    default encoding. Raises EvaluationError if Java fails.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    if not texts:
        return []
    folder = Path(ptbtokenizer.__file__).resolve().parent
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "captions.txt"
        # One text a line: every other line separator, of which Unicode has several, would shift all that follow.
        file.write_text("\n".join(" ".join(text.split()) for text in texts) + "\n", encoding="utf-8")
        done = subprocess.run(
            [
                "java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-cp", str(folder / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR),
                "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(file),
            ],
            capture_output=True,
            check=False,
        )  # fmt: skip
    lines = done.stdout.decode("utf-8", "replace").split("\n")
    if done.returncode or len(lines) < len(texts):
        errors = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise EvaluationError(
            f"CIDEr's tokenizer gave {len(lines)} lines for {len(texts)} captions (exit {done.returncode}): "
            f"{errors[-1] if errors else 'no message'}"
        )
    left_out = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in left_out) for line in lines[: len(texts)]]
