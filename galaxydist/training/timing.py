import time, contextlib


class StepTimer:
    def __init__(self, device):
        self.restart()

    def restart(self):
        self.t = time.perf_counter()
        self.parts = {}

    @contextlib.contextmanager
    def part(self, name):
        t = time.perf_counter()
        yield
        self.parts[name] = self.parts.get(name, 0) + time.perf_counter() - t

    def window(self, num_steps, batch_size, world_size):
        e = time.perf_counter() - self.t
        out = {f"time/{k}": self.parts.get(k, 0) / e for k in ("data_wait", "forward_backward", "optimizer", "checkpoint")}
        out["time/img_s"] = num_steps * batch_size / e
        self.restart()
        return out
