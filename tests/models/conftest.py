"""Runs a test that asks for `head` once per head of its family."""


def pytest_generate_tests(metafunc):
    if "head" in metafunc.fixturenames and metafunc.cls is not None:
        metafunc.parametrize("head", metafunc.cls.heads, ids=str)
