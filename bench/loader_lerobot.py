"""lerobot's side of bench/loader.py, which starts it in an environment that has lerobot.

Reads one question a line, as JSON, and prints one answer a line.
"""

import json
import os
import sys
import time

import lerobot
import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.video_utils import get_safe_default_codec


def main():
    torch.set_num_threads(1)
    root, H, fps = sys.argv[1], 16, 10
    stamps = {"action": [i / fps for i in range(H)]}
    dataset = LeRobotDataset("local/tabletop", root=root, delta_timestamps=stamps)
    for line in sys.stdin:
        verb, *words = json.loads(line)
        if verb == "about":
            torch_ = torch.__version__
            answer = f"lerobot {lerobot.__version__}, {get_safe_default_codec()}, torch {torch_}"
        if verb == "show":
            item = dataset[words[0]]
            images = {k.rpartition(".")[2]: 255 * item[k] for k in item if ".images." in k}
            arrays = {k: x.permute(1, 2, 0).numpy() for k, x in images.items()}
            state, action = item["observation.state"].numpy(), item["action"].numpy()
            np.savez(words[1], state=state, action=action, **arrays)
            answer = True
        if verb == "time":
            workers, seconds = words
            loader = torch.utils.data.DataLoader(dataset, 32, shuffle=True, num_workers=workers)
            batches, count = iter(loader), 0
            for _ in range(3):
                next(batches, None)
            began = time.perf_counter()
            for batch in batches:
                count += len(batch["action"])
                if time.perf_counter() - began > seconds:
                    break
            answer = count / (time.perf_counter() - began)
        print("answer " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)
