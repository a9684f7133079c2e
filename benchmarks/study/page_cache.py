"""One pool of pages with the policy of Manta's (LRU, leaves before parents) that remembers who used which page, and when.

A model in the order of arrival: a request comes, finds what it finds, and leaves all its pages behind at once. Imports the
prefixes and the streams.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from benchmarks.study.prefixes import page_keys
from benchmarks.study.streams import UNKNOWN, StudyRequest, Workload


@dataclass(slots=True)
class Page:
    born_s: float
    used_s: float
    reuses: int = 0
    conversations: set[int] = field(default_factory=set)
    users: set[int] = field(default_factory=set)


@dataclass(slots=True)
class PageStory:
    """What came of all pages. reuses: of each page over its life. lives_s, idles_s: from birth, and from the last use, to
    eviction. gaps_s: between two uses of a page. relations: pages hit, by who hit them."""

    hit_tokens: int = 0
    prompt_tokens: int = 0
    reuses: list[int] = field(default_factory=list)
    lives_s: list[float] = field(default_factory=list)
    idles_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    relations: Counter[str] = field(default_factory=Counter)

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / max(1, self.prompt_tokens)


class PageCache:
    """capacity: pages, None for no bound. Full pages match, by their whole prefix; the last prompt token never does."""

    def __init__(self, page: int, capacity: int | None) -> None:
        self.story = PageStory()
        self._page = page
        self._capacity = capacity
        self._pages: OrderedDict[int, Page] = OrderedDict()  # the least recently used first, children before parents
        self._private = -1

    def __len__(self) -> int:
        return len(self._pages)

    def take(self, request: StudyRequest, unit: int) -> int:
        """One request comes and goes. Returns the pages that it hit."""
        asked, page = request.asked, self._page
        keys = page_keys(request.cached_names, unit, request.computed_tokens, page)
        limit = min(len(keys), (asked.prompt_tokens - 1) // page)
        hits = next((at for at in range(limit) if keys[at] not in self._pages), limit)
        self.story.hit_tokens += hits * page
        self.story.prompt_tokens += asked.prompt_tokens
        for key in keys[:hits]:
            self._reuse(self._pages[key], request)
        missing = request.computed_tokens // page - len(keys)  # pages of tokens that a trace does not name
        for key in reversed(keys + self._own(missing)):
            self._touch(key, request)
        self._evict(asked.arrived_s)
        return hits

    def finish(self) -> PageStory:
        """The pages that are still there count as reused so often; how long they would have lived is not known."""
        self.story.reuses += [page.reuses for page in self._pages.values()]
        self._pages.clear()
        return self.story

    def _own(self, count: int) -> list[int]:
        """Keys of pages that nobody else can have."""
        self._private -= count
        return list(range(self._private + 1, self._private + 1 + count))

    def _reuse(self, page: Page, request: StudyRequest) -> None:
        story = self.story
        story.gaps_s.append(request.asked.arrived_s - page.used_s)
        if request.conversation in page.conversations:
            relation = "same conversation"
        elif request.user == UNKNOWN:
            relation = "other conversation"
        else:
            relation = "same user" if request.user in page.users else "other user"
        story.relations[relation] += 1
        page.reuses += 1

    def _touch(self, key: int, request: StudyRequest) -> None:
        now_s = request.asked.arrived_s
        page = self._pages.pop(key, None) or Page(now_s, now_s)
        page.used_s = now_s
        page.conversations.add(request.conversation)
        page.users.add(request.user)
        self._pages[key] = page

    def _evict(self, now_s: float) -> None:
        story = self.story
        while self._capacity is not None and len(self._pages) > self._capacity:
            _, page = self._pages.popitem(last=False)
            story.reuses.append(page.reuses)
            story.lives_s.append(now_s - page.born_s)
            story.idles_s.append(now_s - page.used_s)


def tell(workload: Workload, page: int, capacity: int | None) -> PageStory:
    """The whole workload through one pool."""
    cache = PageCache(page, capacity)
    for request in workload.requests:
        cache.take(request, workload.unit)
    return cache.finish()
