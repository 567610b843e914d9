"""A step of every optimizer over the weights of ResNet-18, as a training builds it for a CPU.

OMP_NUM_THREADS=1 python -m benchmarks.optimizers
"""

import statistics
import time

import torch
from torch import nn

from models.learning.classifier import Classifier
from models.learning.recipe import computes_gradients
from models.residual import resnet
from pipeline.build.network import build_recipe
from pipeline.cli.compose import choices, compose

STEPS = 9


def milliseconds(name: str, net: nn.Module) -> float:
    """CPU time of a step, the median of nine after two."""
    words = ["+model=resnet", f"optimizer={name}", "schedule=constant"]
    module = Classifier(net, num_classes=1000, recipe=build_recipe(compose("train", words)))
    optimizer = module.optimizer_factory("32-true")([group.options for group in module.rate_groups()])
    if hasattr(optimizer, "train"):
        optimizer.train()
    for weights in net.parameters():
        weights.grad = torch.randn_like(weights)
    times = []
    for _ in range(2 + STEPS):
        start = time.process_time()
        optimizer.step(lambda: 0.0) if computes_gradients(optimizer) else optimizer.step()
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times[2:])


def main() -> None:
    """Print a table."""
    print("| optimizer | ms |\n|---|--:|")
    for name in choices("optimizer"):
        net = resnet("resnet18", image_size=224, num_classes=1000)
        print(f"| {name} | {milliseconds(name, net):.0f} |", flush=True)


if __name__ == "__main__":
    main()
