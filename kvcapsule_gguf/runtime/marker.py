"""What stands for a picture in the text of a prompt. It is new in every process, so that nobody's words can hold it; llama.cpp's own, <__media__>, is text like any other."""

import secrets

MARKER = f"<__media_{secrets.token_hex(8)}__>"
