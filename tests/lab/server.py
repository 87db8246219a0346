"""Answers every HTTP request with the client's address."""

import socket
import sys

listener = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
while True:
    connection, peer = listener.accept()
    with connection:
        connection.settimeout(2)
        try:
            connection.recv(4096)
            body = peer[0].removeprefix("::ffff:").encode()
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
        except OSError:
            continue
