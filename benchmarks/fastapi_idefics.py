"""transformers' IDEFICS behind the plainest FastAPI server, which serving_rival.py compares with: one `generate` after the other.

    python benchmarks/fastapi_idefics.py CHECKPOINT PORT [--threads 2]

POST /generate takes {"prompt": [token ids], "images": [PNG files in base64], "beams", "tokens"} and gives {"token_ids": [...]}. Needs
transformers, torch, Pillow, fastapi and uvicorn, and nothing of this project, so that it runs in an environment of its own.
"""

import argparse
import base64
import io
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI  # type: ignore[import-not-found]
from PIL import Image
from transformers import IdeficsForVisionText2Text

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def server(checkpoint: str, image_token: int) -> FastAPI:
    """The application."""
    model = IdeficsForVisionText2Text.from_pretrained(checkpoint).eval()
    app = FastAPI()

    @app.post("/generate")  # type: ignore[untyped-decorator]
    async def generate(body: dict[str, Any]) -> dict[str, Any]:  # not in a thread: two at once would only share the processor
        files = [Image.open(io.BytesIO(base64.b64decode(file))).convert("RGB") for file in body["images"]]
        pixels = (np.stack([np.asarray(file) for file in files]) / 255 - MEAN) / STD
        ids = torch.tensor([body["prompt"]])
        last = (ids == image_token).cumsum(1) - 1
        seen = torch.nn.functional.one_hot(last.clamp(min=0), len(files)) * (last >= 0)[..., None]
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)[None],
                image_attention_mask=seen,
                num_beams=body["beams"],
                do_sample=False,
                min_new_tokens=body["tokens"],
                max_new_tokens=body["tokens"],
                suppress_tokens=[image_token],
            )
        return {"token_ids": found[0, ids.shape[1] :].tolist()}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("port", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--image-token", type=int, default=32001)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    uvicorn.run(server(asked.checkpoint, asked.image_token), host="127.0.0.1", port=asked.port, log_level="warning")
