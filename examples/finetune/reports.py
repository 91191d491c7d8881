"""Teach PLM-nano to write reports: rows, training, before and after, the model loaded again. `--lora`: adapters alone.

pip install easy-vqa      # 5,000 small pictures with questions; their answers say what a report should
python examples/finetune/reports.py [--lora] [steps=20]
"""

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import perception_lm as plm
from perception_lm.training.launch import train
from perception_lm.training.run import load_run

QUESTION = "You are an inspector. Describe accurately what you see in this image."
LORA = ["model.learn=[]", 'lora.targets=["decoder[.]blocks[.].*"]', "optimizer.lr=5e-3"]


def make_rows(folder: Path, split: str) -> list[dict]:
    """Copy the pictures and write one row each: the picture, the question, the report."""
    import easy_vqa

    told = defaultdict(set)
    for _, answer, number in zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True):
        told[number].add(answer)
    paths, rows = getattr(easy_vqa, f"get_{split}_image_paths")(), []
    for number, words in sorted(told.items()):
        shape = words & {"circle", "rectangle", "triangle"}
        colour = words - shape - {"yes", "no"}
        if len(shape) == len(colour) == 1:
            (folder / split).mkdir(parents=True, exist_ok=True)
            shutil.copy(paths[number], folder / split / f"{number}.png")
            report = f"Finding: one {shape.pop()}. Color: {colour.pop()}. Nothing else."
            turns = [{"from": "human", "value": QUESTION}, {"from": "assistant", "value": report}]
            rows.append({"image": f"{split}/{number}.png", "conversations": turns})
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def show(title: str, assistant: plm.Assistant, rows: list[dict]) -> None:
    """How many reports are right to the letter, and the first of them."""
    answers = [assistant.ask(Path("reports") / row["image"], QUESTION, max_new_tokens=32) for row in rows]
    right = sum(a == row["conversations"][1]["value"] for a, row in zip(answers, rows, strict=True))
    print(f"{title}: {right} of {len(rows)} reports are right; the first: {answers[0]!r}")


if __name__ == "__main__":
    options = [option for option in sys.argv[1:] if option != "--lora"]
    make_rows(Path("reports"), "train")
    test = make_rows(Path("reports"), "test")[:100]
    show("before", plm.load("PLM-nano"), test)
    run = Path(__file__).with_suffix(".toml")
    train(load_run(run, [*(LORA if "--lora" in sys.argv else []), *options]))
    show("after", plm.load("finetuned/model"), test)
