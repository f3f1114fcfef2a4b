"""Phrasing tables: who asks, how things are asked, and how each level answers."""

from .financial import FINANCIAL
from .grammar import Domain, Intent, Kind
from .legal import LEGAL
from .medical import MEDICAL

DOMAINS: dict[str, Domain] = {domain.name: domain for domain in (MEDICAL, LEGAL, FINANCIAL)}

__all__ = ["DOMAINS", "Domain", "Intent", "Kind"]
