class SpikeDetector:
    def __init__(self, threshold):
        pass

    def update(self, step, loss):
        return None

    def state_dict(self):
        return {}

    def load_state_dict(self, s):
        pass
