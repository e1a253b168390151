"""tests/mutations.py: its planted bugs fit the sources as they are."""

from mutations import MUTATIONS, mutated


def test_planted_bugs_still_fit_the_sources():
    """Each rewrites text that stands in its file exactly once."""
    for script, mutations in MUTATIONS.items():
        assert len({name for name, *_ in mutations}) == len(mutations), script
        for mutation in mutations:
            assert mutated(*mutation)
