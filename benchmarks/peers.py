"""One peer's per-example features of the rows that bench_engine.py wrote; runs in an environment of its own.

    python peers.py trak|bergson FOLDER

FOLDER holds `model/` (as save_pretrained() writes it) and `rows.json`: lists of token ids, and labels (trak) or the
number of prompt tokens (bergson). Prints one JSON object: seconds for all rows with storing, without loading the model;
and bytes a row on disk; processor seconds too.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def trak(folder: Path, rows: dict[str, Any], into: Path) -> dict[str, Any]:
    """TRAK: per-example gradients by functional vmap, random projection, written to its store."""
    import torch
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType
    from transformers import AutoModelForSequenceClassification

    class Logits(torch.nn.Module):
        """TRAK's text classification takes a module that returns its logits."""

        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModelForSequenceClassification.from_pretrained(
                folder / "model", num_labels=rows["classes"], attn_implementation="eager"
            )

        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(**inputs).logits
            return logits

    model = Logits().eval()
    named = [name for name, _ in model.named_parameters() if any(t in name for t in rows["targets"])]
    named = [name for name in named if name.endswith("weight")]
    size = sum(p.numel() for name, p in model.named_parameters() if name in named)
    device = torch.device("cpu")
    dim = rows["trak_dim"]
    projector = BasicProjector(size, dim, 0, ProjectionType.rademacher, device, block_size=min(100, dim))
    traker = TRAKer(
        model,
        "text_classification",
        len(rows["ids"]),
        save_dir=str(into),
        device=device,
        projector=projector,
        proj_dim=dim,
        use_half_precision=False,
        grad_wrt=named,
    )
    traker.load_checkpoint(model.state_dict(), model_id=0)
    order = sorted(range(len(rows["ids"])), key=lambda i: len(rows["ids"][i]))
    began, used = time.perf_counter(), time.process_time()
    for at in range(0, len(order), rows["batch"]):
        some = order[at : at + rows["batch"]]
        longest = max(len(rows["ids"][i]) for i in some)
        ids = torch.tensor([rows["ids"][i] + [0] * (longest - len(rows["ids"][i])) for i in some])
        mask = torch.tensor([[0.0] * len(rows["ids"][i]) + [-1e9] * (longest - len(rows["ids"][i])) for i in some])
        mask = mask[:, None, None]  # added to the attention's logits: transformers 5 makes no other mask under vmap
        labels = torch.tensor([rows["labels"][i] for i in some])
        traker.featurize([ids, torch.zeros_like(ids), mask, labels], inds=torch.tensor(some))
    traker.finalize_features()
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    return {"seconds": seconds, "cpu": cpu, "bytes": _bytes(into) / len(order), "features": dim, "parameters": size}


def bergson(folder: Path, rows: dict[str, Any], into: Path) -> dict[str, Any]:
    """Bergson: projected per-example gradients of the named modules, written to its index."""
    import torch
    from bergson.collection import collect_gradients
    from bergson.config.config import IndexConfig
    from bergson.data import allocate_batches
    from bergson.gradients import GradientProcessor
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # as bergson's own loader does, so that backward runs
    labels = [[-100] * p + ids[p:] for ids, p in zip(rows["ids"], rows["prompts"], strict=True)]
    data = Dataset.from_dict({"input_ids": rows["ids"], "labels": labels, "length": [len(i) for i in rows["ids"]]})
    config = IndexConfig(
        run_path=str(into / "run"),
        projection_dim=rows["bergson_dim"],
        token_batch_size=rows["tokens"],
        precision="fp32",
    )
    config.partial_run_path.mkdir(parents=True)
    processor = GradientProcessor(projection_dim=rows["bergson_dim"])
    base = model.base_model
    wanted = {name for name, _ in base.named_modules() if any(name.endswith(t) for t in rows["targets"])}
    began, used = time.perf_counter(), time.process_time()
    batches = allocate_batches(data["length"][:], rows["tokens"])
    collect_gradients(model, data, processor, config, batches=batches, target_modules=wanted)
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    return {
        "seconds": seconds,
        "cpu": cpu,
        "bytes": _bytes(into) / len(labels),
        "features": rows["bergson_dim"] ** 2 * len(wanted),
        "modules": len(wanted),
    }


def main() -> None:
    """Run one peer."""
    import torch

    name, folder = sys.argv[1], Path(sys.argv[2])
    rows = json.loads((folder / "rows.json").read_text())
    torch.set_num_threads(rows["threads"])
    with tempfile.TemporaryDirectory() as into:
        found = {"trak": trak, "bergson": bergson}[name](folder, rows, Path(into))
    print("RESULT " + json.dumps(found | {"rows": len(rows["ids"])}))


if __name__ == "__main__":
    main()
