"""One rank for test_scorer_metric: python scorer_ranks.py FOLDER RANK RANKS."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from test_scorer_metric import questions

from lit_prune.evaluation.scorers import rule_of
from lit_prune.evaluation.scorers.metric import Scorer

if __name__ == "__main__":
    folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    metric = Scorer(rule_of("pope"))
    asked, answers = questions(5), ["Yes", "No", "Yes", "Yes", "No"]
    mine = {0: [0, 2, 4], 1: [1, 3, 0], 2: []}[rank]
    if mine:
        metric.update([answers[n] for n in mine], [asked[n] for n in mine])
    figures = metric.compute()
    (folder / f"{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()
