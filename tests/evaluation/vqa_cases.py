"""Random answers on which our VQA accuracy is compared with the official rule's.

`python tests/evaluation/vqa_cases.py VQA_METRIC.PY` records what the official code says of them (data/vqa_official.json). VQA_METRIC.PY is
open_flamingo/eval/vqa_metric.py of the wheel of open_flamingo 2.0.1, the evaluation code of visualqa.org, which runs without torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import random
import sys
from pathlib import Path

RECORD = Path(__file__).parent / "data" / "vqa_official.json"
COUNT = 1000
_WORDS = """red Red blue a an the A The none zero one two ten eleven dont don't couldnt've couldn'tve couldntve theyre ows'at somebody'd
    shed've yall isnt Im Id've 1,000 1000 3.5 u.s. U.S. mr. café naïve 东京 yes no left-right black/white (maybe) "quoted" what? hello! a,b a, b
    ; _under_ @home `tick` x=y 1+1 {curly} [square] < > . ..... end. new\nline tab\there 'tis""".split(" ")  # noqa: SIM905  # blanks and line ends among them are meant


def cases() -> list[tuple[str, list[str]]]:
    """What is said, and the ten annotators' answers."""
    draw = random.Random(16)

    def phrase() -> str:
        words = [draw.choice(_WORDS) for _ in range(draw.choice((0, 1, 1, 1, 2, 3)))]
        text = draw.choice((" ", " ", "  ")).join(words)
        return (
            draw.choice(("", " "))
            + draw.choice((str.lower, str.upper, str, str))(text)
            + draw.choice(("", " ", ".", "\n", ","))
        )

    found = []
    for _ in range(COUNT):
        pool = [phrase() for _ in range(draw.choice((1, 2, 3, 5)))]
        answers = [draw.choice(pool) for _ in range(10)]
        found.append((draw.choice([*pool, phrase()]), answers))
    return found


def digest() -> str:
    """Of the cases, so that recorded values are never compared with others."""
    return hashlib.sha256(json.dumps(cases()).encode()).hexdigest()


def _official(path: str) -> list[float]:
    spec = importlib.util.spec_from_file_location("vqa_metric", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    truth, said = module.VQA(), module.VQA()
    for number, (text, answers) in enumerate(cases()):
        given = [{"answer": answer, "answer_id": at} for at, answer in enumerate(answers)]
        truth.qa[number] = {"question_id": number, "answers": given, "question_type": "", "answer_type": ""}
        said.qa[number] = {"question_id": number, "answer": text}
    said.dataset = {"annotations": [{"question_id": number} for number in range(COUNT)]}
    evaluation = module.VQAEval(truth, said, n=10)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate(list(range(COUNT)))
    return [evaluation.evalQA[number] for number in range(COUNT)]


if __name__ == "__main__":
    RECORD.write_text(json.dumps({"cases_sha256": digest(), "accuracy": _official(sys.argv[1])}) + "\n")
