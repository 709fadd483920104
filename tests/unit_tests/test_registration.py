"""Families in torchtitan's registry, in a process in which others have registered them before."""

from torchtitan.protocols.train_spec import get_train_spec

from refine_titan import registration


def test_builders_of_a_program_that_trains_count_whoever_registered_first(monkeypatch):
    monkeypatch.setattr(registration, "_builders", dict(registration._builders))
    registration.register_models()
    registration.register_models(lambda **settings: settings, lambda *settings: settings)
    registration.register_models()
    spec = get_train_spec("delta_net")
    assert spec.build_metrics_processor_fn(1, 2, 3) == (1, 2, 3)
    assert spec.build_validator_fn(tokenizer=4) == {"tokenizer": 4}
