"""Early stopping on loss and accuracy, and over a restart."""

from galaxydist.training.resume import EarlyStopping


def test_early_stopping_waits_and_survives_a_restart() -> None:
    stopping = EarlyStopping("loss", patience=2)
    assert [stopping.update(value, step) for step, value in enumerate([1.0, 0.5, 0.5, 0.7])] == [True, True, False, False]
    assert stopping.should_stop and stopping.best == 0.5 and stopping.best_step == 1
    again = EarlyStopping("loss", patience=2)
    again.load_state_dict(stopping.state_dict())
    assert again == stopping


def test_early_stopping_maximises_accuracy_and_never_stops_with_patience_0() -> None:
    stopping = EarlyStopping("accuracy", patience=0)
    assert [stopping.update(value, 0) for value in (0.5, 0.6, 0.1, 0.1)] == [True, True, False, False]
    assert not stopping.should_stop
