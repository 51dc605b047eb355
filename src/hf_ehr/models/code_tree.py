"""The trees that ontology embeddings pass messages over, built from the code strings of a vocabulary alone.

    ICD9CM/250.02 → ICD9CM/250 → ICD9CM/249-259 → root        code, category, range of categories (ICD-9 procedures
    ICD10CM/E11.65 → ICD10CM/E11 → ICD10CM/E → root           have chapters for ranges; ICD-10-CM its first letter)
    ATC/C07AB02 → ATC/C07AB → ATC/C07A → ATC/C07 → ATC/C → root
    NDC/0002-1433 → root                                       what is not understood

Source of the levels: MedM-PLM's and G-BERT's `build_tree.py`, which skip those between an ICD code and its category.
A level equal to the code itself (category 042, an ATC code cut to four characters) is left out, not repeated.
"""

from collections.abc import Sequence

from .code_hierarchy import ancestors, block, is_valid

NO_PARENT = -1


def tree_chain(code: str) -> list[str]:
    """The nodes above ``code`` without the root, nearest first.

    Example:
        >>> tree_chain("ICD9CM/250.00"), tree_chain("ICD9CM/E812.0"), tree_chain("ICD9CM/042")
        (['ICD9CM/250', 'ICD9CM/249-259'], ['ICD9CM/E812', 'ICD9CM/E810-E819'], ['ICD9CM/042-042'])
        >>> tree_chain("ICD10CM/E11.65"), tree_chain("ATC/C07A"), tree_chain("NDC/0002-1433")
        (['ICD10CM/E11', 'ICD10CM/E'], ['ATC/C07', 'ATC/C'], [])
    """
    above = ancestors(code)
    vocabulary, _, value = code.partition("/")
    if vocabulary == "ATC":
        return above
    category = above[-1:]
    top = f"ICD10CM/{value[0]}" if vocabulary == "ICD10CM" and is_valid(code) else block(code)
    return category if top is None else [*category, top]


def code_parents(tokens: Sequence[str], num_special_tokens: int) -> list[int]:
    """The tree of a vocabulary as parents.

    Args:
        tokens: The vocabulary in the order of its ids: special tokens, then codes ``VOCABULARY/CODE``.
        num_special_tokens: How many special tokens there are; they are in no tree.

    Returns:
        The parent of every node, -1 for special tokens and for the root. Nodes are the ids of the vocabulary, then the
        levels above that are no codes of it, then the root.

    Raises:
        ValueError: A token occurs twice.

    Example:
        >>> code_parents(["[PAD]", "[CLS]", "ATC/C07A", "ATC/C07", "NDC/1"], 2)
        [-1, -1, 3, 5, 6, 6, -1]
    """
    nodes = {token: index for index, token in enumerate(tokens)}
    if len(nodes) != len(tokens):
        raise ValueError(
            f"`tokens` must be distinct, {len(tokens) - len(nodes)} of {len(tokens)} occur twice. Pass a vocabulary "
            "in the order of its ids."
        )
    above: dict[str, str | None] = {}
    for code in list(tokens)[num_special_tokens:]:
        chain = [code, *tree_chain(code)]
        above |= dict(zip(chain, [*chain[1:], None], strict=True))
    for node in above:
        nodes.setdefault(node, len(nodes))
    root = len(nodes)
    parents = [NO_PARENT] * (root + 1)
    for node, parent in above.items():
        parents[nodes[node]] = root if parent is None else nodes[parent]
    return parents


def flat_parents(vocab_size: int, num_special_tokens: int) -> list[int]:
    """The tree without levels: every code hangs at the root.

    Example:
        >>> flat_parents(4, 2)
        [-1, -1, 4, 4, -1]
    """
    return [NO_PARENT] * num_special_tokens + [vocab_size] * (vocab_size - num_special_tokens) + [NO_PARENT]


def check_parents(parents: Sequence[int], vocab_size: int, num_special_tokens: int) -> None:
    """Refuses what is no tree over the vocabulary.

    Raises:
        ValueError: Special tokens have parents, codes have none, a parent is no node, or parents run in a circle.
    """
    if len(parents) <= vocab_size or any(parent != NO_PARENT for parent in parents[:num_special_tokens]):
        raise ValueError(
            f"parents must be those of {vocab_size} ids and of at least a root, -1 for {num_special_tokens} special "
            f"tokens, got {len(parents)}. Build them with `GBertConfig.from_vocabularies`."
        )
    roots = [node for node, parent in enumerate(parents) if parent == NO_PARENT][num_special_tokens:]
    if len(roots) != 1 or roots[0] < vocab_size or not all(NO_PARENT <= parent < len(parents) for parent in parents):
        raise ValueError(
            f"parents must lead every code to one root behind the vocabulary, got the roots {roots[:5]}. Build them "
            "with `GBertConfig.from_vocabularies`."
        )
    ancestor_chains(parents)


def ancestor_chains(parents: Sequence[int]) -> list[list[int]]:
    """All ancestors of every node, nearest first.

    Raises:
        ValueError: Parents run in a circle.
    """
    chains: list[list[int]] = []
    for node in range(len(parents)):
        chain, above = [], parents[node]
        while above != NO_PARENT:
            chain.append(above)
            if len(chain) > len(parents):
                raise ValueError(f"parents must form a tree, got a circle above node {node}. Build them anew.")
            above = parents[above]
        chains.append(chain)
    return chains
