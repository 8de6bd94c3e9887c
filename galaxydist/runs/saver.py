from galaxydist.runs import checkpoints


class CheckpointSaver:
    failed = False

    def __init__(self, d, *, background, check):
        self.d = d
        self.check = check

    def save(self, step, tensors, state, *, best):
        self.check()
        checkpoints.save(self.d, step, tensors, state, best=best)

    def wait(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *a):
        pass
