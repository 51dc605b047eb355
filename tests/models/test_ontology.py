"""Ontology embeddings: trees from code strings, two stages of graph attention over them (rows 29 and 30)."""

import pytest
import torch

from hf_ehr import GBertConfig
from hf_ehr.models.code_tree import ancestor_chains, code_parents, tree_chain
from hf_ehr.models.modeling_ontology import OntologyEmbeddings, init_ontology
from tests.models.visits import DIAGNOSES, MEDICATIONS, SPECIAL


def embeddings(tokens=(*SPECIAL, *DIAGNOSES), size: int = 12, heads: int = 3) -> OntologyEmbeddings:
    torch.manual_seed(0)
    module = OntologyEmbeddings(code_parents(tokens, len(SPECIAL)), len(tokens), size, heads)
    module.apply(init_ontology)
    torch.nn.init.normal_(module.graph_attention.bias)
    return module


# Trees


@pytest.mark.parametrize(
    ("code", "chain"),
    [
        ("ICD9CM/250.00", ["ICD9CM/250", "ICD9CM/249-259"]),
        ("ICD9CM/E812.0", ["ICD9CM/E812", "ICD9CM/E810-E819"]),
        ("ICD9CM/V58.67", ["ICD9CM/V58", "ICD9CM/V50-V59"]),
        ("ICD9CM/042", ["ICD9CM/042-042"]),
        ("ICD9Proc/39.95", ["ICD9Proc/39", "ICD9Proc/35-39"]),
        ("ICD10CM/S52.521A", ["ICD10CM/S52", "ICD10CM/S"]),
        ("ICD10CM/I10", ["ICD10CM/I"]),
        ("ATC/C07A", ["ATC/C07", "ATC/C"]),
        ("ATC/A10BA02", ["ATC/A10BA", "ATC/A10B", "ATC/A10", "ATC/A"]),
        ("ICD9CM/99999", []),
        ("NDC/0002-1433", []),
    ],
)
def test_the_levels_above_a_code(code, chain):
    assert tree_chain(code) == chain


def test_every_code_of_a_vocabulary_reaches_the_one_root_by_its_levels():
    tokens = [*SPECIAL, *DIAGNOSES, *MEDICATIONS]
    parents = code_parents(tokens, len(SPECIAL))
    assert parents[: len(SPECIAL)] == [-1] * len(SPECIAL)
    root = len(parents) - 1
    for node, chain in list(enumerate(ancestor_chains(parents)))[len(SPECIAL) : len(tokens)]:
        assert chain[-1] == root
        assert len(chain) == len(tree_chain(tokens[node])) + 1
        known = [tokens[above] if above < len(tokens) else None for above in chain[:-1]]
        assert all(name in (None, above) for name, above in zip(known, tree_chain(tokens[node]), strict=True))
    # 250 is a code of the vocabulary: its node is the parent of 250.00, and no second one is made.
    assert parents[tokens.index("ICD9CM/250.00")] == tokens.index("ICD9CM/250")


@pytest.mark.parametrize(
    "parents", [[-1, -1, 3, -1], [-1, 2, 3], [-1, -1, 4, 4, 3], [-1, -1, 4, 9, -1], [5, -1, 4, 4, -1]]
)
def test_what_is_no_tree_is_refused(parents):
    fields = {"diagnosis_vocab_size": 4, "medication_vocab_size": 4, "num_special_tokens": 2, "cls_token_id": 1}
    assert GBertConfig(**fields, diagnosis_parents=[-1, -1, 4, 4, -1]).tree("medication") == [-1, -1, 4, 4, -1]
    with pytest.raises(Exception, match="diagnosis_parents"):
        GBertConfig(**fields, diagnosis_parents=parents)


def test_a_vocabulary_that_repeats_itself_is_refused():
    with pytest.raises(ValueError, match="distinct"):
        code_parents(["[PAD]", "ATC/C07A", "ATC/C07A"], 1)


# Graph attention


def looked(attention, target, sources) -> torch.Tensor:
    """One node looks at itself and at others: Eq 4-5 of the paper, head by head."""
    nodes = [target, *sources]
    parts = []
    for head, (a_target, a_source) in enumerate(zip(attention.target_scores, attention.source_scores, strict=True)):
        width = len(a_target)
        weight = attention.projection.weight[head * width : (head + 1) * width]
        scores = [a_target @ (weight @ target) + a_source @ (weight @ node) for node in nodes]
        alpha = torch.stack([score if score > 0 else 0.2 * score for score in scores]).softmax(dim=0)
        parts.append(sum(share * (weight @ node) for share, node in zip(alpha, nodes, strict=True)))
    return torch.cat(parts) + attention.bias


@torch.no_grad()
def test_both_stages_equal_a_dense_reference():
    module, tokens = embeddings(), [*SPECIAL, *DIAGNOSES]
    parents, nodes = code_parents(tokens, len(SPECIAL)), module.nodes
    above = {
        node: looked(module.graph_attention, nodes[node], [nodes[n] for n, p in enumerate(parents) if p == node])
        for node in set(parents) - {-1}
    }
    chains = ancestor_chains(parents)
    for code in range(len(tokens)):
        expected = nodes[code]
        if chains[code]:
            expected = looked(module.graph_attention, nodes[code], [above[node] for node in chains[code]])
        torch.testing.assert_close(module(torch.tensor([[code]]))[0, 0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_code_is_the_same_whatever_else_is_in_the_batch():
    module = embeddings()
    ids = torch.tensor([[[7, 5, 9, 7], [0, 2, 15, 6]], [[12, 12, 1, 8], [10, 11, 13, 14]]])
    together = module(ids)
    assert together.shape == (2, 2, 4, 12)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(4)).tolist():
        torch.testing.assert_close(together[tuple(place)], module(ids[tuple(place)][None])[0], atol=1e-6, rtol=0)


def changed_by(module: OntologyEmbeddings, node: int, code: int) -> bool:
    with torch.no_grad():
        before = module(torch.tensor([code]))
        module.nodes[node] += 1.0
        after = module(torch.tensor([code]))
        module.nodes[node] -= 1.0
    return bool((before - after).abs().max() > 1e-4)


def test_parents_siblings_and_their_like_change_a_leaf_and_others_do_not():
    tokens = [*SPECIAL, *DIAGNOSES]
    module, parents = embeddings(), code_parents(tokens, len(SPECIAL))
    leaf = tokens.index("ICD9CM/250.00")
    category = tokens.index("ICD9CM/250")
    ranges, root = parents[category], len(parents) - 1
    sibling, other_category = tokens.index("ICD9CM/250.02"), parents[tokens.index("ICD9CM/251.2")]
    for node in (leaf, category, ranges, root, sibling, other_category, tokens.index("LOCAL/1")):
        assert changed_by(module, node, leaf), node
    # Below a category that is no ancestor, and in another chapter.
    for node in (tokens.index("ICD9CM/251.2"), tokens.index("ICD9CM/428.0"), tokens.index("ICD10CM/E11.65"), 0, 4):
        assert not changed_by(module, node, leaf), node


def test_special_tokens_are_plain_rows():
    module = embeddings()
    with torch.no_grad():
        assert torch.equal(module(torch.arange(5)), module.nodes[:5])


def test_only_what_a_batch_looks_at_is_computed():
    tokens = [*SPECIAL, *DIAGNOSES]
    module, parents = embeddings(), code_parents(tokens, len(SPECIAL))
    leaf = tokens.index("ICD9CM/250.00")
    seen = []
    module.graph_attention.projection.register_forward_hook(lambda layer, args, out: seen.append(len(args[0])))
    module(torch.tensor([leaf] * 50)).sum().backward()
    chain = ancestor_chains(parents)[leaf]
    children = [node for node, parent in enumerate(parents) if parent in chain]
    assert seen == [len(chain), len(children), 1, len(chain)]  # fifty times the same code is once the code
    touched = module.nodes.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    assert touched == sorted({*chain, *children})
