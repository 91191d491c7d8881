"""Teach PLM-nano to write reports: rows, answers before, training, answers after, the model exported and loaded again.

pip install easy-vqa      # small pictures with questions; their answers say what a report should
python examples/finetune/reports.py [RUN.toml [KEY=VALUE]...]      # reports.toml, or lora.toml: adapters alone
"""

import json
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path

import perception_lm as plm
from perception_encoder.evaluation.metrics import wilson_interval
from perception_lm.training import load_run, train

QUESTION = "You are an inspector. Describe accurately what you see in this image."
ROWS = Path("reports")


def make_rows(split: str) -> list[dict]:
    """Copy the pictures and write one row each: the picture, the question, the report."""
    import easy_vqa

    told, rows = defaultdict(set), []
    for _, answer, number in zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True):
        told[number].add(answer)
    (ROWS / split).mkdir(parents=True, exist_ok=True)
    for number, path in sorted(getattr(easy_vqa, f"get_{split}_image_paths")().items()):
        shape = told[number] & {"circle", "rectangle", "triangle"}
        colour = told[number] - shape - {"yes", "no"}
        if len(shape) == len(colour) == 1:  # else its questions do not tell
            shutil.copy(path, ROWS / split / f"{number}.png")
            report = f"Finding: one {shape.pop()}. Color: {colour.pop()}. Nothing else."
            turns = [{"from": "human", "value": QUESTION}, {"from": "assistant", "value": report}]
            rows.append({"image": f"{split}/{number}.png", "conversations": turns})
    (ROWS / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def show(when: str, folder: str | Path, rows: list[dict]) -> None:
    """How many reports are right to the letter, with the 95 % interval, and the first of them."""
    shown = ({"type": "image", "image": ROWS / row["image"]} for row in rows)
    asked = [[{"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]}] for picture in shown]
    answers = [reply.text for reply in plm.load(folder).generate(asked, max_new_tokens=32, batch_size=50)]
    right = sum(answer == row["conversations"][1]["value"] for answer, row in zip(answers, rows, strict=True))
    low, high = wilson_interval(right / len(rows), len(rows))
    print(f"{when}: {right} of {len(rows)} right ({low:.0%} to {high:.0%}); the first: {answers[0]!r}", flush=True)


if __name__ == "__main__":
    file, *overrides = sys.argv[1:] or [str(Path(__file__).with_suffix(".toml"))]
    run, known, unseen = load_run(file, overrides), make_rows("train"), make_rows("test")[:200]
    usual = Counter(row["conversations"][1]["value"] for row in known).most_common(1)[0][0]
    print(f"always the same: {sum(usual == r['conversations'][1]['value'] for r in unseen)} of {len(unseen)} right")
    show("before", run.model.init, unseen)
    if not train(run):
        sys.exit("stopped; the same command goes on")
    show("after", f"{run.out}/{'adapter' if run.lora else 'model'}", unseen)
    plm.load(f"{run.out}/model").save(f"{run.out}/hf", "hf")
    show("exported and loaded again", f"{run.out}/hf", unseen[:20])
