"""Which hosts no_proxy means, by the table that test_proxy.py holds against gRPC itself."""

from __future__ import annotations

import pytest
from little_proxy import AROUND

from fedfms.preflight.network import proxy_for


@pytest.mark.parametrize(("host", "no_proxy", "around"), AROUND)
def test_a_host_is_meant_by_its_whole_name_or_by_whole_parts_of_it(host, no_proxy, around):
    environment = {"https_proxy": "http://proxy.invalid:3128", "no_proxy": no_proxy}
    assert (proxy_for(host, environment) is None) is around
