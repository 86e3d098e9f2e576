"""A story keeps its names if it is about its two characters to the end: every story of the corpus does."""

from __future__ import annotations

import pytest

from merino_edge.data.story_names import keeps_names, names_in
from merino_edge.data.tiny_stories import SEPARATOR, TWO_FRIENDS, tiny_stories


def test_every_toy_story_keeps_its_names_and_none_does_with_a_third() -> None:
    stories = [story for story in tiny_stories(seed=3, stories=200).split(SEPARATOR) if story.strip()]
    assert len(stories) == 200 and all(map(keeps_names, stories))
    for story in stories:
        hero, friend = names_in(story)
        third = "Hugo" if "Hugo" not in (hero, friend) else "Zoe" if "Zoe" not in (hero, friend) else "Mia"
        head, found, tail = story.rpartition(friend)
        assert found and not keeps_names(f"{head}{third}{tail}")
        assert not keeps_names(story.replace(friend, hero))


@pytest.mark.parametrize(
    "story", ["", "A fox named Luna.", "Luna met Tom. Luna was glad.", "Lunatic Tomes, Lunatic Tomes"]
)
def test_a_story_that_ends_early_does_not(story: str) -> None:
    assert not keeps_names(story)


def test_with_a_cast_every_story_is_about_it() -> None:
    stories = [story for story in tiny_stories(stories=100, cast=TWO_FRIENDS).split(SEPARATOR) if story.strip()]
    assert len(stories) == 100 and all(map(keeps_names, stories))
    assert {name for story in stories for name in names_in(story)} == {"Luna", "Hugo"}
    assert all("fox named Luna. She " in story for story in stories)
