"""Write tests/golden/model: tiny GGUF files and the logits that `transformers` computes from the same weights, and the greedy
answers of real models to the prompts of MODEL.greedy.json, of those that are in the cache.
"""

import json
from pathlib import Path

import numpy as np
from real_model import greedy, load_by_transformers
from tiny_models import GOLDEN, build, logits_by_transformers, token_ids, write_gguf

from jilju.model.sources import list_models

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
    for path in sorted(FOLDER.glob("*.greedy.json")):
        write_greedy(path)


def write_greedy(path: Path) -> None:
    golden = json.loads(path.read_text())
    file = next((m.path for m in list_models() if m.entry.name == golden["model"] and m.cached), None)
    if file is None:
        print(f"{golden['model']} is not in the cache, {path.name} stays as it is")
        return
    model = load_by_transformers(file)
    for answer in golden["greedy"]:
        answer["ids"] = greedy(model, answer["prompt_ids"], len(answer["ids"]))
    lines = ",\n".join("  " + json.dumps(answer) for answer in golden["greedy"])
    head = "".join(f' "{name}": {json.dumps(golden[name])},\n' for name in ("model", "made_by"))
    path.write_text(f'{{\n{head} "greedy": [\n{lines}\n ]\n}}\n')
    print(f"{path.name}: {len(golden['greedy'])} answers")


if __name__ == "__main__":
    main()
