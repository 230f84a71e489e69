"""A training of one number, in this process: for what all trainings share."""

import torch
from accelerate import Accelerator

from scripts.training import trainer
from scripts.training.cli import parse_settings
from scripts.training.settings import RunSettings


class Walk:
    """A training of one number, in this process; `act` is called before each step."""

    def __init__(self, act):
        self.model, self.other, self.act = torch.nn.Linear(1, 1, bias=False), torch.zeros(1), act
        torch.nn.init.ones_(self.model.weight)

    def parts(self):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1)
        return {"model": trainer.Part(self.model, [self.optimizer], self.loss)}

    def batch(self, step):
        self.act(self, step)
        return torch.randn(1, generator=trainer.generator(0, step))

    def loss(self, batch):
        loss = (self.model.weight * batch).abs().sum()
        return loss, {"loss": loss}

    def after(self, step):
        return {}

    def buffers(self):
        return {"other": self.other}

    def validate(self, model):
        return {"score": model.weight.item()}, {}


def walk(directory, *flags, act=lambda training, step: None):
    """The result of it."""
    given = ["--run", str(directory), "--steps=20", "--batch=1", "--lr=1", *flags]
    settings = parse_settings(RunSettings, [flag for flag in given if flag != "--steps=20"
                                            or not any("--time" in other for other in flags)], "")
    return trainer.train(settings, Accelerator(cpu=True), lambda steps: Walk(act))
