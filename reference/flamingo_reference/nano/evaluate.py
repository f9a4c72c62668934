"""Measures the nano checkpoint on held-out images: `python -m flamingo_reference.nano.evaluate [--markdown | --json] [--images FOLDER]`.

Prints what the model card quotes: exact captions and right answers (greedy and beam search of 3, bare prompts and the paper's zero-shot
prompts), and few-shot prompts whose format only the shots tell. In PyTorch. An answer is right when it is the expected text to the
letter. `--card` writes the tables into the checkpoint's MODEL_CARD.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

from flamingo_reference.model import Flamingo
from flamingo_reference.nano import CHECKPOINT, pages
from flamingo_reference.nano.batches import collate, to_pixels
from flamingo_reference.nano.heldout import (
    COUNTS,
    FEW_SHOT,
    SHOTS,
    few_shot_queries,
    heldout,
    some_questions,
    support_pool,
    texts_pool,
    that_fit,
)
from flamingo_reference.nano.pictures import Item
from flamingo_reference.nano.pool import Pool
from flamingo_reference.nano.train_tokenizer import load_tokenizer
from flamingo_reference.search import Rules, beam_search, flamingo_next_logits
from flamingo_reference.time_weights import time_weights

MAX_NEW_TOKENS = 16
MODEL_CARD = Path(__file__).parent / "MODEL_CARD.md"
CARD_START, CARD_END = "<!-- numbers -->", "<!-- /numbers -->"


class Rate(msgspec.Struct, frozen=True):
    """right of total, in per cent."""

    right: int
    total: int

    @property
    def percent(self) -> float:
        """Share that is right."""
        return 100 * self.right / self.total


class Results(msgspec.Struct, frozen=True):
    """Everything measured. Tables: row (a kind of medium) -> way of asking -> rate."""

    captions: dict[str, dict[str, Rate]]
    questions: dict[str, dict[str, Rate]]
    few_shot: dict[str, dict[str, Rate]]
    """Style ("all" for their sum) -> shots -> rate; "0, two texts" is the paper's zero-shot prompt."""


class Reader:
    """Answers prompts about a fixed list of items with greedy decoding."""

    def __init__(self, model: Flamingo, tokenizer: Tokenizer, items: Sequence[Item]) -> None:
        self.model, self.tokenizer, self.items = model.eval(), tokenizer, items
        self._latents = torch.stack([self._encode(item) for item in items]) if items else torch.zeros(0)

    @torch.no_grad()
    def _encode(self, item: Item) -> torch.Tensor:
        features = self.model.vision_encoder(to_pixels(list(item.frames), self.model.config))[None]
        weights = time_weights(len(item.frames), self.model.config.resampler.num_time_embeddings)
        latents: torch.Tensor = self.model.resampler(features, torch.from_numpy(weights))[0]
        return latents

    def ask(self, prompts: Sequence[Sequence[pages.Piece]], *, batch: int = 32) -> list[str]:
        """What the model says after each prompt; the last piece of a prompt is what is asked, its `said` left out."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            for index, answer in zip(chosen, self._greedy([prompts[index] for index in chosen]), strict=True):
                answers[index] = answer
        return answers

    def search(self, prompt: Sequence[pages.Piece], *, beams: int) -> str:
        """What beam search finds, as the paper evaluates."""
        document = self._open(prompt)
        tokens = self.model.config.tokens
        with torch.no_grad():
            media = self.model.media_kv(self._latents[list(document.media)])
        next_logits = flamingo_next_logits(self.model, media, range(len(document.media)))
        rules = Rules(eoc=tokens.eoc, image=tokens.image, max_new_tokens=MAX_NEW_TOKENS)
        found = beam_search(next_logits, document.token_ids.tolist(), rules, beams=beams).hypotheses[0].token_ids
        return self.tokenizer.decode([token for token in found if token != tokens.eoc]).strip()

    @torch.no_grad()
    def _greedy(self, prompts: Sequence[Sequence[pages.Piece]]) -> list[str]:
        tokens = self.model.config.tokens
        documents = [self._open(prompt) for prompt in prompts]
        said: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        _, _, _, rows, bank = collate(documents)
        media = self.model.media_kv(self._latents[bank] if bank else torch.zeros(1, *self._latents.shape[1:]))
        for _ in range(MAX_NEW_TOKENS):
            grown = [
                pages.Encoded(
                    np.concatenate([document.token_ids, answer]).astype(np.int64),
                    np.concatenate([document.phi, np.full(len(answer), document.phi[-1])]).astype(np.int64),
                    np.zeros(len(document.token_ids) + len(answer), dtype=bool),
                    document.media,
                )
                for document, answer in zip(documents, said, strict=True)
            ]
            ids, phi, _, _, _ = collate(grown)
            logits = self.model(ids, media, rows, phi)
            for index, document in enumerate(grown):
                scores = logits[index, len(document.token_ids) - 1].clone()
                scores[tokens.image] = -torch.inf
                token = int(scores.argmax())
                if not done[index]:
                    done[index] = token == tokens.eoc
                    said[index] += [] if done[index] else [token]
            if all(done):
                break
        return [self.tokenizer.decode(answer).strip() for answer in said]

    def _open(self, prompt: Sequence[pages.Piece]) -> pages.Encoded:
        asked = msgspec.structs.replace(prompt[-1], said="")
        encoded = pages.encode([*prompt[:-1], asked], self.tokenizer, self.model.config.tokens)
        return pages.Encoded(encoded.token_ids[:-1], encoded.phi[:-1], encoded.loss[:-1], encoded.media)  # without the <EOC>


def rate(answers: Sequence[str], expected: Sequence[str]) -> Rate:
    """How many answers are the expected ones."""
    return Rate(sum(answer == wanted for answer, wanted in zip(answers, expected, strict=True)), len(answers))


GREEDY, BEAMS, TEXTS = "greedy", "3 beams", "greedy after two texts"


def evaluate(
    model: Flamingo,
    tokenizer: Tokenizer,
    *,
    scenes: int = COUNTS["scene"],
    digits: int = COUNTS["digit"],
    videos: int = COUNTS["video"],
    few_shot: int = FEW_SHOT,
) -> Results:
    """Runs all measurements; few_shot is the number of queries for each format and number of shots."""
    captions: dict[str, dict[str, Rate]] = {}
    questions: dict[str, dict[str, Rate]] = {}
    texts = texts_pool()
    for kind, count in (("scene", scenes), ("digit", digits), ("video", videos)):
        queries = heldout(kind, count)
        reader = Reader(model, tokenizer, [*queries, *texts.items])
        caption_prompts = [[pages.Piece(index, "Output:", "")] for index in range(count)]
        asked = [(index, *question) for index, item in enumerate(queries) for question in some_questions(item, index)]
        question_prompts = [[pages.Piece(index, f"Question: {question} Answer:", "")] for index, question, _ in asked]
        wanted = [item.caption for item in queries]
        answers = [answer for _, _, answer in asked]
        for way in (GREEDY, BEAMS, TEXTS):
            said = _say(reader, caption_prompts, way, texts, count, kind, "caption")
            captions.setdefault(kind, {})[way] = rate(said, wanted)
            if kind == "scene":
                for name, single in (("scene, one object", True), ("scene, two or more", False)):
                    chosen = [index for index, item in enumerate(queries) if (item.num_objects == 1) == single]
                    captions.setdefault(name, {})[way] = rate([said[i] for i in chosen], [wanted[i] for i in chosen])
            said = _say(reader, question_prompts, way, texts, count, kind, "question")
            questions.setdefault(kind, {})[way] = rate(said, answers)
            if kind == "scene":
                for index, (_, question, _) in enumerate(asked):
                    name = f"scene, {' '.join(question.split()[:2]).lower()}"
                    old = questions.setdefault(name, {}).get(way, Rate(0, 0))
                    questions[name][way] = Rate(old.right + (said[index] == answers[index]), old.total + 1)
    for table in (captions, questions):
        table["images"] = {way: add([table["scene"][way], table["digit"][way]]) for way in table["scene"]}
    return Results(captions, questions, few_shot_rates(model, tokenizer, count=few_shot))


def _say(
    reader: Reader, prompts: list[list[pages.Piece]], way: str, texts: Pool, offset: int, kind: str, style: str
) -> list[str]:
    """Answers in one of the three ways; `offset` is where the reader holds the items of `texts`."""
    if way == BEAMS:
        return [reader.search(prompt, beams=3) for prompt in prompts]
    if way == TEXTS:
        rng = np.random.default_rng(13)
        draw = texts.drawer(kind)
        given = [pages.prompt_page(texts.items, rng, draw, style=style, shots=2, text_only=2) for _ in prompts]
        prompts = [[*two, *prompt] for two, prompt in zip(given, prompts, strict=True)]
    return reader.ask(prompts)


def add(rates: Sequence[Rate]) -> Rate:
    """The rate over all of them."""
    return Rate(sum(rate.right for rate in rates), sum(rate.total for rate in rates))


def few_shot_rates(
    model: Flamingo, tokenizer: Tokenizer, *, count: int, shots: Sequence[int] = SHOTS
) -> dict[str, dict[str, Rate]]:
    """For every format but the plain caption: `count` held-out items, asked with 0 to 32 shots from the training split."""
    support = support_pool()
    queries = few_shot_queries(count)
    reader = Reader(model, tokenizer, [*support.items, *queries])
    table: dict[str, dict[str, Rate]] = {}
    for kind in ("scene", "digit"):
        for style in support.styles(kind):
            fits = [len(support.items) + index for index in that_fit(queries, kind, style, count)]
            wanted = [reader.items[query].formats[style] for query in fits]
            draw = support.drawer(kind)
            for name, number, text_only in [("0, two texts", 2, 2), *((str(number), number, 0) for number in shots)]:
                rng = np.random.default_rng([11, number])
                prompts = []
                for query in fits:
                    examples = pages.prompt_page(support.items, rng, draw, style=style, shots=number, text_only=text_only)
                    prompts.append([*examples, pages.Piece(query, "Output:", "")])
                table.setdefault(style, {})[name] = rate(reader.ask(prompts, batch=16 if number > 8 else 32), wanted)
    names = list(next(iter(table.values())))
    table["all"] = {name: add([rates[name] for rates in table.values()]) for name in names}
    return table


def markdown(results: Results) -> str:
    """The model card's tables."""
    lines = []
    for title, table in (("exact captions", results.captions), ("right answers", results.questions)):
        lines += [f"| {title}, held-out | {GREEDY} | {BEAMS} | {TEXTS} | of |", "|---|---|---|---|---|"]
        for kind, rates in sorted(table.items(), key=lambda row: (row[0] != "images", row[0])):
            cells = " | ".join(f"{rates[way].percent:.1f} %" for way in (GREEDY, BEAMS, TEXTS))
            lines.append(f"| {kind} | {cells} | {rates[GREEDY].total} |")
        lines.append("")
    columns = list(results.few_shot["all"])
    lines.append("| format that only the shots tell | " + " | ".join(columns) + " |")
    lines.append("|---" * (len(columns) + 1) + "|")
    for style, rates in results.few_shot.items():
        lines.append(f"| {style} | " + " | ".join(f"{rates[column].percent:.0f} %" for column in columns) + " |")
    each = results.few_shot[next(iter(results.few_shot))]["0"].total
    lines += ["", f"Columns: number of shots. {each} queries for each format and column."]
    return "\n".join(lines)


def write_card(path: Path, tables: str) -> None:
    """Replaces what stands between the card's two markers. Raises ValueError if they are missing."""
    text = path.read_text(encoding="utf-8")
    start, found, rest = text.partition(CARD_START)
    _, ends, end = rest.partition(CARD_END)
    if not found or not ends:
        raise ValueError(f"{path} lacks the lines {CARD_START} and {CARD_END} between which the tables go")
    path.write_text(f"{start}{CARD_START}\n{tables}\n{CARD_END}{end}", encoding="utf-8")


def contact_sheet(model: Flamingo, tokenizer: Tokenizer, path: Path) -> None:
    """Writes a picture of held-out images with what the model says of them (red where it is not what was expected)."""
    items = [*heldout("scene", 12), *heldout("digit", 6), *heldout("video", 6)]
    reader = Reader(model, tokenizer, items)
    said = reader.ask([[pages.Piece(index, "Output:", "")] for index in range(len(items))])
    columns, width, height = 6, 190, 172
    sheet = Image.new("RGB", (columns * width, -(-len(items) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (item, answer) in enumerate(zip(items, said, strict=True)):
        x, y = index % columns * width, index // columns * height
        sheet.paste(
            Image.fromarray(item.frames[len(item.frames) // 2]).resize((128, 128), Image.Resampling.NEAREST), (x + 8, y + 8)
        )
        words, line, row = answer.split(), "", 0
        for word in [*words, ""]:
            if not word or len(line) + len(word) > 28:
                draw.text((x + 8, y + 140 + 12 * row), line, fill="black" if answer == item.caption else "red")
                line, row = "", row + 1
            line += f"{word} "
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--markdown", action="store_true", help="print tables (the default)")
    parser.add_argument("--images", type=Path, help="also write a contact sheet into this folder")
    parser.add_argument("--card", action="store_true", help="also write the tables into MODEL_CARD.md")
    parser.add_argument("--quick", action="store_true", help="a tenth of the items")
    arguments = parser.parse_args()
    model = Flamingo.from_checkpoint(arguments.checkpoint)
    tokenizer = load_tokenizer(arguments.checkpoint / "tokenizer" / "tokenizer.json")
    part = 10 if arguments.quick else 1
    results = evaluate(
        model,
        tokenizer,
        scenes=COUNTS["scene"] // part,
        digits=COUNTS["digit"] // part,
        videos=COUNTS["video"] // part,
        few_shot=6 if arguments.quick else FEW_SHOT,
    )
    text = msgspec.json.encode(results).decode() if arguments.json else markdown(results)
    sys.stdout.write(text + "\n")
    if arguments.card:
        write_card(MODEL_CARD, markdown(results))
    if arguments.images:
        contact_sheet(model, tokenizer, arguments.images / "contact_sheet.png")


if __name__ == "__main__":
    main()
