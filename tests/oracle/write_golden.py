"""Write tests/golden/model: tiny GGUF files and the logits that `transformers` computes from the same weights."""

from pathlib import Path

import numpy as np
from tiny_models import GOLDEN, build, logits_by_transformers, token_ids, write_gguf

FOLDER = Path(__file__).parents[1] / "golden" / "model"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for tiny in GOLDEN:
        model, ids = build(tiny), token_ids()
        write_gguf(FOLDER / f"{tiny.name}.gguf", model, tiny)
        np.savez(
            FOLDER / f"{tiny.name}.npz", token_ids=np.array(ids, np.int32), logits=logits_by_transformers(model, ids)
        )
        sizes = [(FOLDER / f"{tiny.name}{suffix}").stat().st_size for suffix in (".gguf", ".npz")]
        print(f"{tiny.name}: {sizes[0]:,} bytes of model, {sizes[1]:,} bytes of logits")


if __name__ == "__main__":
    main()
