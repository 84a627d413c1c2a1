"""The coding questions of a Spec-Bench file, both turns, and the first 20 dev rows of an MBPP file, as one questions file.

Usage: pair_questions.py SPEC_BENCH.jsonl MBPP.jsonl OUT.jsonl
"""

import json
import sys
from pathlib import Path


def rows_of(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


coding = [row for row in rows_of(sys.argv[1]) if row["category"] == "coding"]
mbpp = [row for row in rows_of(sys.argv[2]) if row["split"] == "dev"][:20]
questions = [
    *(
        {"question_id": row["question_id"], "category": "coding", "turns": row["turns"]}
        for row in coding
    ),
    *(
        {"question_id": f"mbpp-{row['task_id']}", "category": "mbpp", "turns": [row["prompt"]]}
        for row in mbpp
    ),
]
Path(sys.argv[3]).write_text("".join(json.dumps(row) + "\n" for row in questions))
print(f"{len(coding)} coding questions and {len(mbpp)} of MBPP in {sys.argv[3]}")
