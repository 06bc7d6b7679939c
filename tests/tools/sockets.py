"""Which sockets this process connects or binds, while it is watched."""

import contextlib
import socket


@contextlib.contextmanager
def watched():
    """A list that fills with the addresses of sockets while the block runs."""
    opened = []
    homes = {"connect": socket.socket, "connect_ex": socket.socket, "bind": socket.socket}
    homes["getaddrinfo"] = socket

    def watch(name, before):
        def spy(*arguments, **more):
            opened.append((name, repr(arguments[1:])))
            return before(*arguments, **more)

        return spy

    kept = {name: getattr(home, name) for name, home in homes.items()}
    for name, home in homes.items():
        setattr(home, name, watch(name, kept[name]))
    try:
        yield opened
    finally:
        for name, home in homes.items():
            setattr(home, name, kept[name])
