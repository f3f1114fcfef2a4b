"""Phrasing tables: who asks, how things are asked, and how each level answers."""

from alignvec.recipes.phrasing.financial import FINANCIAL
from alignvec.recipes.phrasing.grammar import Domain, Intent, Kind
from alignvec.recipes.phrasing.legal import LEGAL
from alignvec.recipes.phrasing.medical import MEDICAL

DOMAINS: dict[str, Domain] = {domain.name: domain for domain in (MEDICAL, LEGAL, FINANCIAL)}

__all__ = ["DOMAINS", "Domain", "Intent", "Kind"]
