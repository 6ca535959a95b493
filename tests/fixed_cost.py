"""Engines that draft as fixed costs say, whatever the machine does."""

from inference.engine import Engine
from inference.speculation import Cost


class FixedCost(Cost):
    """What is measured changes nothing: a pass costs 1, and one more token `token_seconds`."""

    def __init__(self, token_seconds=0.0, pass_seconds=1.0):
        super().__init__()
        self.weight, self.token_seconds, self.pass_seconds = 1.0, token_seconds, pass_seconds

    def add(self, n_tokens, seconds):
        pass

    def seconds(self, n_tokens):
        return self.pass_seconds + self.token_seconds * n_tokens


def speculating(model, drafter, tokenizer=None, token_seconds=0.0, **settings):
    """An engine in which drafting pays as these costs say, by default always."""
    engine = Engine(model, tokenizer, drafter=drafter, **settings)
    engine.speculation.passes, engine.speculation.drafts = FixedCost(token_seconds), FixedCost(pass_seconds=0.0)
    return engine
