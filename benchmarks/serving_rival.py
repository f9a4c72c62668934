"""Answers a second beside transformers' IDEFICS behind the plainest FastAPI server (fastapi_idefics.py): one set of weights, both over HTTP.

    python -m venv ../rival; ../rival/bin/pip install fastapi uvicorn torch transformers pillow
    python benchmarks/serving_rival.py --python ../rival/bin/python [--threads 2] [--rounds 3] [--prompt 512] [--save]

The model is that of idefics_cpu.py: 12 layers of 768, random weights, and a vision encoder too small to count. 8 clients ask at once, and each
asks again as soon as it was answered, until `--each` answers each:

    shared   a prompt of `--prompt` tokens with 8 images, the same for all of a round but for the last 16 tokens; 3 beams, 32 tokens
    single   a prompt of a tenth of that with one image of its own, greedy, 32 tokens

The two servers take turns, ours first; each round has new images and prompts, so nothing is left of an earlier one. Printed: answers a second
by the clock and by the servers' processor time, and how many answers are equal (random weights have near ties).
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import idefics_cpu
import numpy as np
import psutil
from idefics_cpu import IMAGE, SIDE, VOCABULARY
from PIL import Image

import flamingo_export

CLIENTS, TOKENS, OWN = 8, 32, 16
Question = tuple[list[int], list[str]]
"""Token ids, and images as base64 of PNG files."""


def images(rng: np.random.Generator, count: int) -> list[str]:
    """Random pixels."""
    found = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(file, "PNG")
        found.append(base64.b64encode(file.getvalue()).decode())
    return found


def questions(kind: str, seed: int, count: int, prompt: int) -> list[Question]:
    """Different ones, of a round."""
    rng = np.random.default_rng([seed, len(kind)])
    if kind == "shared":
        pictures = images(rng, 8)
        shots = rng.integers(10, VOCABULARY, prompt - OWN)
        shots[:: -(-len(shots) // 8)] = IMAGE
        return [([*shots.tolist(), *rng.integers(10, VOCABULARY, OWN).tolist()], pictures) for _ in range(count)]
    return [([IMAGE, *rng.integers(10, VOCABULARY, prompt // 10).tolist()], images(rng, 1)) for _ in range(count)]


def ours(question: Question, beams: int) -> tuple[str, dict[str, Any]]:
    """Path and body."""
    ids, pictures = question
    media = [f"data:image/png;base64,{picture}" for picture in pictures]
    return "/v1/completions", {
        "model": "m",
        "prompt": ids,
        "images": media,
        "beams": beams,
        "max_tokens": TOKENS,
        "min_tokens": TOKENS,
        "logprobs": 0,
    }


def theirs(question: Question, beams: int) -> tuple[str, dict[str, Any]]:
    """Path and body."""
    ids, pictures = question
    return "/generate", {"prompt": ids, "images": pictures, "beams": beams, "tokens": TOKENS}


@contextmanager
def process(line: Sequence[str], port: int, ready: str, threads: int) -> Iterator[psutil.Process]:
    """A server that answers at `ready`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL) as started:
        try:
            end = time.monotonic() + 300
            while True:
                if started.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{line[0]} does not start")
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                try:
                    connection.request("GET", ready)
                    if connection.getresponse().status == 200:
                        break
                except OSError:
                    time.sleep(0.5)
                finally:
                    connection.close()
            yield psutil.Process(started.pid)
        finally:
            started.terminate()
            started.wait(60)


def round_of(
    port: int, asked: Sequence[tuple[str, dict[str, Any]]], server: psutil.Process
) -> tuple[float, float, list[dict[str, Any]]]:
    """Answers a second by the clock, and by the server's processor time, and the answers in the order of the questions."""
    answers: list[Any] = [None] * len(asked)

    def client(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
        for index in range(first, len(asked), CLIENTS):
            path, body = asked[index]
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            found = connection.getresponse()
            answers[index] = json.loads(found.read())
            if found.status != 200:
                raise RuntimeError(answers[index])
        connection.close()

    used, began = sum(server.cpu_times()[:2]), time.perf_counter()
    threads = [threading.Thread(target=client, args=(index,)) for index in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not all(answers):
        raise RuntimeError("a question was not answered")
    seconds, busy = time.perf_counter() - began, sum(server.cpu_times()[:2]) - used
    return len(asked) / seconds, len(asked) / busy, answers


def free_port() -> int:
    """One that nobody uses at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def compared(
    kind: str,
    beams: int,
    rounds: int,
    each: int,
    prompt: int,
    ask: dict[str, Callable[[Sequence[tuple[str, dict[str, Any]]]], tuple[float, float, list[dict[str, Any]]]]],
) -> dict[str, Any]:
    """Interleaved rounds of one kind of question."""
    rates: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    equal = total = 0
    for number in range(rounds):
        asked = questions(kind, number, CLIENTS * each, prompt)
        *rate, mine = ask["ours"]([ours(question, beams) for question in asked])
        rates["ours"].append((rate[0], rate[1]))
        *rate, other = ask["theirs"]([theirs(question, beams) for question in asked])
        rates["theirs"].append((rate[0], rate[1]))
        for one, two in zip(mine, other, strict=True):
            total += 1
            words = " ".join(f"w{token}" for token in two["token_ids"])
            equal += one["choices"][0]["text"].split() == words.split()
    clock, busy = (
        [mine[which] / other[which] for mine, other in zip(rates["ours"], rates["theirs"], strict=True)] for which in (0, 1)
    )
    found: dict[str, Any] = {
        "answers_a_second": {name: float(np.median([rate[0] for rate in each_rate])) for name, each_rate in rates.items()},
        "times": float(np.median(clock)),
        "times_of_processor_time": float(np.median(busy)),
        "rounds": clock,
        "equal": equal / total,
    }
    second = found["answers_a_second"]
    print(
        f"{kind}, {beams} beam{'s' if beams > 1 else ''}: {second['ours']:.3f} answers a second, transformers {second['theirs']:.3f}: "
        f"{found['times']:.1f} times as many, {found['times_of_processor_time']:.1f} for the same processor time "
        f"(rounds {', '.join(f'{value:.1f}' for value in clock)}); {found['equal']:.0%} of the answers equal",
        flush=True,
    )
    return found


def with_tokenizer(checkpoint: Path) -> None:
    """Words w3, w4 ..., one for each token, which our server needs to write answers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>"]
    words = [*special[:3], *(f"w{number}" for number in range(3, VOCABULARY)), *special[3:]]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(checkpoint / "tokenizer.json"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="of the environment that has fastapi, torch and transformers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--each", type=int, default=1, help="answers of each of the 8 clients in a round")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12, help="of the model")
    parser.add_argument("--save", action="store_true", help="write results/serving_rival.json")
    asked = parser.parse_args()
    rival = Path(__file__).with_name("fastapi_idefics.py")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "idefics"
        idefics_cpu.idefics(asked.layers).save_pretrained(checkpoint)
        with_tokenizer(checkpoint)
        built = flamingo_export.build(checkpoint, out=Path(folder) / "m.bundle", storage="fp32", parity="skip")
        ports = free_port(), free_port()
        threads = ["--threads", str(asked.threads)]
        mine = [sys.executable, "-m", "flamingo_export", "serve", f"{built.path}", "--port", str(ports[0]), *threads]
        other = [asked.python, str(rival), str(checkpoint), str(ports[1]), *threads]
        with (
            process([*mine, "--timeout", "3600"], ports[0], "/health/ready", asked.threads) as first,
            process(other, ports[1], "/docs", asked.threads) as second,
        ):
            ask = {
                "ours": lambda all_: round_of(ports[0], all_, first),
                "theirs": lambda all_: round_of(ports[1], all_, second),
            }
            for beams in (1, 3):  # to warm up
                warm = questions("single", 1000, CLIENTS, 40)[:1]
                ask["ours"]([ours(question, beams) for question in warm])
                ask["theirs"]([theirs(question, beams) for question in warm])
            found = {
                kind: compared(kind, beams, asked.rounds, asked.each, asked.prompt, ask)
                for kind, beams in (("shared", 3), ("single", 1))
            }
    if asked.save:
        print(common.save("serving_rival", {"threads": asked.threads, "layers": asked.layers, "prompt": asked.prompt, **found}))


if __name__ == "__main__":
    main()
