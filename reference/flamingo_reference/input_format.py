"""How images and text become a model's input, as it was trained: the fit of images, the tags in text, the forms of prompts.

Only data, recorded with every bundle. Sizes, means and standard deviations are the model configuration's.
"""

from __future__ import annotations

from typing import Literal

import msgspec

ImageFit = Literal["pad", "crop", "stretch", "tiles"]
"""How an image becomes a square, with Pillow's antialiased bicubic filter. pad: its longer side fits, the rest is the mean colour.
crop: its shorter side fits, the middle is taken. stretch: each side fits, whatever its shape. tiles: it becomes several squares, with
the bilinear filter (runtime/tiles.py); of models whose vision encoder takes tiles."""


class Tags(msgspec.Struct, frozen=True, kw_only=True):
    """Texts of the tokens that carry structure; their ids are the model configuration's."""

    bos: str | None = "<BOS>"
    """Put before every text; None where the model was trained without."""
    eoc: str = "<EOC>"
    image: str = "<image>"
    around_image: str | None = None
    """Stands before and after every image, once between two that follow each other (IDEFICS)."""
    added: tuple[str, ...] = ()
    """Tokens that training put behind the language model's vocabulary, in this order; `<PAD>` only where there was no padding token."""
    bos_after_images: bool = False
    """Whether `bos` is put behind the images that a text begins with, and nowhere if the text has it already (Llama 3.2 Vision)."""

    @property
    def all(self) -> tuple[str, ...]:
        """The tags there are."""
        return tuple(tag for tag in (self.bos, self.eoc, self.image, self.around_image) if tag is not None)


class PromptForms(msgspec.Struct, frozen=True, kw_only=True):
    """Texts with the fields {image}, {question} and {answer}: an example, and what is asked after the examples.

    template: the Jinja template by which the checkpoint writes conversations. Where there is one, `caption` and `question` are what the user
    says, an example is a turn of the user's and one of the assistant's, and the template makes a text of the turns.
    """

    caption_example: str = "{image}Output: {answer}<EOC>"
    caption: str = "{image}Output:"
    question_example: str = "{image}Question: {question} Answer: {answer}<EOC>"
    question: str = "{image}Question: {question} Answer:"
    template: str | None = None


class InputFormat(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    fit: ImageFit = "pad"
    tags: Tags = Tags()
    prompts: PromptForms = PromptForms()


PAPER = InputFormat()
"""Flamingo (arXiv 2204.14198): section 3.1 and appendix C."""
OPENFLAMINGO = InputFormat(
    fit="crop",
    tags=Tags(bos=None, eoc="<|endofchunk|>", added=("<|endofchunk|>", "<image>", "<PAD>")),
    prompts=PromptForms(
        caption_example="{image}Output:{answer}<|endofchunk|>",
        caption="{image}Output:",
        question_example="{image}Question:{question} Short answer:{answer}<|endofchunk|>",
        question="{image}Question:{question} Short answer:",
    ),
)
"""OpenFlamingo (arXiv 2308.01390): open_clip's transforms for evaluation, which its training used too (open_flamingo/src/factory.py), those
of torchvision; the prompts of its evaluation (open_flamingo/eval/models/open_flamingo.py). Its tokenizers put nothing before a text, but
LLaMA's, see `with_bos`."""
OTTER = InputFormat(
    fit="crop",
    tags=Tags(bos=None, eoc="<|endofchunk|>", added=("<|endofchunk|>", "<image>", "<answer>", "<PAD>")),
    prompts=PromptForms(
        caption_example="{image}User: What does the image describe? GPT:<answer>{answer}<|endofchunk|>",
        caption="{image}User: What does the image describe? GPT:<answer>",
        question_example="{image}User: {question} GPT:<answer>{answer}<|endofchunk|>",
        question="{image}User: {question} GPT:<answer>",
    ),
)
"""Otter (Li et al. 2023, arXiv 2305.03726): CLIP's transforms, the prompts of its evaluation. `<answer>` parts the answer from the question."""
IDEFICS = InputFormat(
    fit="stretch",
    tags=Tags(bos="<s>", eoc="</s>", around_image="<fake_token_around_image>"),
    prompts=PromptForms(
        caption_example="User:{image}Describe this image.\nAssistant: {answer}\n",
        caption="User:{image}Describe this image.\nAssistant:",
        question_example="User:{image}{question}\nAssistant: {answer}\n",
        question="User:{image}{question}\nAssistant:",
    ),
)
"""IDEFICS (OBELICS, arXiv 2306.16527): images stretched to the encoder's square; the prompts of its published examples."""
IDEFICS_INSTRUCT = InputFormat(
    fit="stretch",
    tags=Tags(bos="<s>", eoc="<end_of_utterance>", around_image="<fake_token_around_image>"),
    prompts=PromptForms(
        caption_example="User:{image}Describe this image.<end_of_utterance>\nAssistant: {answer}<end_of_utterance>\n",
        caption="User:{image}Describe this image.<end_of_utterance>\nAssistant:",
        question_example="User:{image}{question}<end_of_utterance>\nAssistant: {answer}<end_of_utterance>\n",
        question="User:{image}{question}<end_of_utterance>\nAssistant:",
    ),
)
"""IDEFICS tuned on instructions: each turn ends with a token of its own."""


LLAMA_VISION = InputFormat(
    fit="tiles",
    tags=Tags(bos="<|begin_of_text|>", eoc="<|end_of_text|>", image="<|image|>", bos_after_images=True),
    prompts=PromptForms(
        caption_example="{image}Output: {answer}\n\n",
        caption="{image}Output:",
        question_example="{image}Question: {question} Answer: {answer}\n\n",
        question="{image}Question: {question} Answer:",
    ),
)
"""Llama 3.2 Vision that was not tuned on instructions: the paper's words, since none are published. transformers' processor (Mllama) puts
the first token behind leading images, which the prompts here begin with themselves."""
_USER, _ASSISTANT = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
LLAMA_VISION_INSTRUCT = InputFormat(
    fit="tiles",
    tags=Tags(bos="<|begin_of_text|>", eoc="<|eot_id|>", image="<|image|>", bos_after_images=True),
    prompts=PromptForms(
        caption_example=f"{_USER}{{image}}Describe this image.<|eot_id|>{_ASSISTANT}{{answer}}<|eot_id|>",
        caption=f"{_USER}{{image}}Describe this image.<|eot_id|>{_ASSISTANT}",
        question_example=f"{_USER}{{image}}{{question}}<|eot_id|>{_ASSISTANT}{{answer}}<|eot_id|>",
        question=f"{_USER}{{image}}{{question}}<|eot_id|>{_ASSISTANT}",
    ),
)
"""Llama 3.2 Vision tuned on instructions, for checkpoints without a chat template: Llama 3's turns. Where there is one, see `with_template`."""

FAMILY_TAGS = (
    *("<BOS>", "<EOC>", "<|endofchunk|>", "<fake_token_around_image>", "<end_of_utterance>"),
    *("<|begin_of_text|>", "<|eot_id|>", "<|image|>"),
)
"""Tags that one family has and another may not, and that nothing but a prompt has: `<s>` may also be HTML."""


def with_bos(inputs: InputFormat, bos: str | None) -> InputFormat:
    """The same format with another token, or none, before every text."""
    return msgspec.structs.replace(inputs, tags=msgspec.structs.replace(inputs.tags, bos=bos))


def with_template(inputs: InputFormat, template: str) -> InputFormat:
    """The same format with a checkpoint's own template for conversations."""
    caption, question = "{image}Describe this image.", "{image}{question}"
    forms = PromptForms(
        caption_example=caption, caption=caption, question_example=question, question=question, template=template
    )
    return msgspec.structs.replace(inputs, prompts=forms)
