"""A plugin of pytest: a third of the tests, chosen by a seed, for a run on other versions."""

import zlib


def pytest_addoption(parser):
    parser.addoption("--third", metavar="SEED", help="run a third of the tests, chosen by SEED")


def pytest_collection_modifyitems(config, items):
    seed = config.getoption("--third")
    if seed is not None:
        items[:] = [item for item in items
                    if not zlib.crc32(f"{seed} {item.nodeid}".encode()) % 3]
