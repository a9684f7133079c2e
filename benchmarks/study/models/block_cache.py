"""One pool of blocks with the policy of Manta's (LRU, leaves before parents) that remembers who used which block, and when.

A model in the order of arrival: a request comes, finds what it finds, and leaves all its blocks behind at once. Imports the
prefixes and the streams.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from benchmarks.study.models.prefixes import block_keys
from benchmarks.study.models.streams import UNKNOWN, StudyRequest, Workload


@dataclass(slots=True)
class Block:
    born_s: float
    used_s: float
    reuses: int = 0
    conversations: set[int] = field(default_factory=set)
    users: set[int] = field(default_factory=set)


@dataclass(slots=True)
class BlockStory:
    """What came of all blocks. reuses: of each block over its life. lives_s, idles_s: from birth, and from the last use, to
    eviction. gaps_s: between two uses of a block. relations: blocks hit, by who hit them."""

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


class BlockCache:
    """capacity: blocks, None for no bound. Full blocks match, by their whole prefix; the last prompt token never does."""

    def __init__(self, block: int, capacity: int | None) -> None:
        self.story = BlockStory()
        self._block = block
        self._capacity = capacity
        self._blocks: OrderedDict[int, Block] = OrderedDict()  # the least recently used first, children before parents
        self._private = -1

    def __len__(self) -> int:
        return len(self._blocks)

    def take(self, request: StudyRequest, unit: int) -> int:
        """One request comes and goes. Returns the blocks that it hit."""
        asked, block = request.asked, self._block
        keys = block_keys(request.cached_names, unit, request.computed_tokens, block)
        limit = min(len(keys), (asked.prompt_tokens - 1) // block)
        hits = next((at for at in range(limit) if keys[at] not in self._blocks), limit)
        self.story.hit_tokens += hits * block
        self.story.prompt_tokens += asked.prompt_tokens
        for key in keys[:hits]:
            self._reuse(self._blocks[key], request)
        missing = request.computed_tokens // block - len(keys)  # blocks of tokens that a trace does not name
        for key in reversed(keys + self._own(missing)):
            self._touch(key, request)
        self._evict(asked.arrived_s)
        return hits

    def finish(self) -> BlockStory:
        """The blocks that are still there count as reused so often; how long they would have lived is not known."""
        self.story.reuses += [block.reuses for block in self._blocks.values()]
        self._blocks.clear()
        return self.story

    def _own(self, count: int) -> list[int]:
        """Keys of blocks that nobody else can have."""
        self._private -= count
        return list(range(self._private + 1, self._private + 1 + count))

    def _reuse(self, block: Block, request: StudyRequest) -> None:
        story = self.story
        story.gaps_s.append(request.asked.arrived_s - block.used_s)
        if request.conversation in block.conversations:
            relation = "same conversation"
        elif request.user == UNKNOWN:
            relation = "other conversation"
        else:
            relation = "same user" if request.user in block.users else "other user"
        story.relations[relation] += 1
        block.reuses += 1

    def _touch(self, key: int, request: StudyRequest) -> None:
        now_s = request.asked.arrived_s
        block = self._blocks.pop(key, None) or Block(now_s, now_s)
        block.used_s = now_s
        block.conversations.add(request.conversation)
        block.users.add(request.user)
        self._blocks[key] = block

    def _evict(self, now_s: float) -> None:
        story = self.story
        while self._capacity is not None and len(self._blocks) > self._capacity:
            _, block = self._blocks.popitem(last=False)
            story.reuses.append(block.reuses)
            story.lives_s.append(now_s - block.born_s)
            story.idles_s.append(now_s - block.used_s)


def tell(workload: Workload, block: int, capacity: int | None) -> BlockStory:
    """The whole workload through one pool."""
    cache = BlockCache(block, capacity)
    for request in workload.requests:
        cache.take(request, workload.unit)
    return cache.finish()
