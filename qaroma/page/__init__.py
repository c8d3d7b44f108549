"""``qaroma page``: the commands as one window in a browser, for people who do not like terminals.

The page only runs commands, which it shows; a run is a process of its own, and outlives the page. It is built on
Starlette and uvicorn: two packages of 2 MB, and screens that jinja2 writes on the server. A screen that waits for a
command is sent as far as it is known; one of a run at work is asked for again and again. So little script is left, and
the policy sent with every screen forbids all but that one file. NiceGUI 3 brings more, in 105 MB and 49 packages with
all that it needs; its pages are put together in the browser by Vue, over a websocket, which such a policy would stop.
"""
