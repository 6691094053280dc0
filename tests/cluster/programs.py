"""Programs that pods of the tests run: echo server; held, short and single connections; sniffer."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time

MARKER = b"meshlight-plaintext-marker"


def serve(port: int) -> None:
    """Echo every byte back; half-close is answered with half-close."""
    listener = socket.create_server(("", port), backlog=256)

    def echo(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)

    print("serving", flush=True)
    while True:
        threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()


def hold(host: str, port: int) -> None:
    """Keep one connection; send the marker 20 times a second, check every echo, count."""
    connection = socket.create_connection((host, port), timeout=10)
    number = 0
    while True:
        message = MARKER + b"-%08d\n" % number
        connection.sendall(message)
        answer = b""
        while len(answer) < len(message):
            part = connection.recv(len(message) - len(answer))
            if not part:
                print(json.dumps({"held": number, "lost": "closed by peer"}), flush=True)
                sys.exit(1)
            answer += part
        assert answer == message
        number += 1
        print(json.dumps({"held": number}), flush=True)
        time.sleep(0.05)


def load(host: str, port: int) -> None:
    """Short connections without end, each sends the marker, half-closes and reads the echo."""
    done = failed = 0
    while True:
        try:
            with socket.create_connection((host, port), timeout=10) as connection:
                connection.sendall(MARKER)
                connection.shutdown(socket.SHUT_WR)
                answer = b""
                while part := connection.recv(4096):
                    answer += part
            if answer != MARKER:
                raise OSError(f"short answer of {len(answer)} bytes")
            done += 1
        except OSError as error:
            failed += 1
            print(json.dumps({"error": repr(error), "at": time.time()}), flush=True)
        if (done + failed) % 20 == 0:
            print(json.dumps({"done": done, "failed": failed}), flush=True)


def once(host: str, port: int) -> None:
    """Connect as the very first act, send the marker, check the echo, end."""
    with socket.create_connection((host, port), timeout=10) as connection:
        connection.sendall(MARKER)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(4096):
            answer += part
    sys.exit(answer != MARKER)


def sniff(interface: str) -> None:
    """Count packets by what they show: the marker in clear, or TLS records to port 15008."""
    capture = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
    capture.bind((interface, 0))
    clear = hbone = 0
    reported = 0.0
    capture.settimeout(0.2)
    while True:
        try:
            packet = capture.recv(65536)
            clear += MARKER in packet
            if packet[12:14] == b"\x08\x00" and packet[23] == 6:
                header = 14 + (packet[14] & 15) * 4
                ports = {
                    int.from_bytes(packet[header : header + 2], "big"),
                    int.from_bytes(packet[header + 2 : header + 4], "big"),
                }
                payload = packet[header + (packet[header + 12] >> 4) * 4 :]
                hbone += 15008 in ports and payload[:2] == b"\x17\x03"
        except TimeoutError:
            pass
        if time.monotonic() - reported > 0.2:
            reported = time.monotonic()
            print(json.dumps({"clear": clear, "hbone": hbone}), flush=True)


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    match verb:
        case "serve":
            serve(int(rest[0]))
        case "hold":
            hold(rest[0], int(rest[1]))
        case "load":
            load(rest[0], int(rest[1]))
        case "once":
            once(rest[0], int(rest[1]))
        case "sniff":
            sniff(rest[0])
