"""The registry of learned methods."""

import pytest

from dscsnet_jax.unfolding.network import DSCSNet, NetworkConfig
from dscsnet_jax.unfolding.registry import make_network, network_names, register


def test_methods_are_made_by_name_with_their_hyper_parameters() -> None:
    assert make_network("dscsnet") == DSCSNet()
    assert make_network("dscsnet", tied=True, division=5) == DSCSNet(
        NetworkConfig(tied=True, division=5)
    )


def test_unknown_names_tell_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'dscnet'; the known ones are dscsnet"):
        make_network("dscnet")
    with pytest.raises(ValueError, match=r"no hyper-parameter 'chanels'; did you mean 'channels'"):
        make_network("dscsnet", chanels=3)
    with pytest.raises(ValueError, match=r"no hyper-parameter 'q'; known: .*iterations"):
        make_network("dscsnet", q=3)


@pytest.mark.parametrize(("field", "value"), [("iterations", "3"), ("channels", 2.5), ("tied", 1)])
def test_a_value_of_another_type_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"hyper-parameter '{field}' is of type .*, got {value!r}"):
        make_network("dscsnet", **{field: value})


def test_a_name_is_given_once() -> None:
    class Other:
        """Not DSCSNet."""

    with pytest.raises(ValueError, match=r"'dscsnet' is dscsnet_jax.unfolding.network.DSCSNet"):
        register("dscsnet")(Other)
    assert register("dscsnet")(DSCSNet) is DSCSNet
    assert network_names()[0] == "dscsnet"
