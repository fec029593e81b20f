"""The model spec and its JSON form."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from singerembed.model.spec import ModelSpec


def test_json_and_back(spec: ModelSpec) -> None:
    for one in (
        spec,
        replace(spec, normalise=9.2),
        replace(spec, precision="fp16"),
        replace(spec, centred_on="9 crops"),
    ):
        assert ModelSpec.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_an_encoder_that_is_not_centred_has_the_fields_of_before(spec: ModelSpec) -> None:
    """Engines' identities are made of them."""
    assert "centred_on" not in spec.to_dict()
    assert replace(spec, centred_on="9 crops").to_dict() == {**spec.to_dict(), "centred_on": "9 crops"}


def test_sizes_are_derived(spec: ModelSpec) -> None:
    assert (spec.n_frames, spec.crop_seconds, spec.log_divisor) == (345, 4.0, 0.0)
    assert replace(spec, normalise=9.2).log_divisor == 9.2


def test_fields_missing_or_unknown_are_named(spec: ModelSpec) -> None:
    fields = spec.to_dict()
    del fields["n_mels"]
    with pytest.raises(ValueError, match="n_mels"):
        ModelSpec.from_dict({**fields, "bogus": 1})
    with pytest.raises(ValueError, match="bogus"):
        ModelSpec.from_dict({**fields, "bogus": 1})


@pytest.mark.parametrize(
    ("field", "value"), [("normalise", "batch"), ("normalise", 0), ("normalise", -1.0), ("precision", "int4")]
)
def test_values_out_of_range(spec: ModelSpec, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        replace(spec, **{field: value})  # type: ignore[arg-type]
