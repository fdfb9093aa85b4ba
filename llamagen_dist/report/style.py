"""The page's style sheet and the colours that pages and plots share (light and dark)."""

# name -> (light, dark). Every light value is different, because plots are recoloured by value.
# Series colours: Okabe & Ito's colour-blind-safe set, lightened for the dark page.
THEME = {
    "ink": ("#1c2127", "#e8eaed"),
    "soft": ("#59636e", "#a3abb5"),
    "rule": ("#dfe3e8", "#343a41"),
    "paper": ("#ffffff", "#15181c"),
    "panel": ("#f6f7f9", "#1d2126"),
    "blue": ("#0b66a8", "#5fb4ec"),
    "orange": ("#d2601a", "#f2a04e"),
    "green": ("#0f8a68", "#45c9a0"),
}


def variables(column: int) -> str:
    return ";".join(f"--{name}:{values[column]}" for name, values in THEME.items())


FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif'
_MONO = 'ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace'

# Written with line breaks anywhere; they are taken out below.
CSS = f"""
:root{{color-scheme:light dark;{variables(0)}}}
@media(prefers-color-scheme:dark){{:root{{{variables(1)}}}}}
*{{box-sizing:border-box}}
html{{-webkit-text-size-adjust:100%;scroll-behavior:smooth}}
body{{margin:0;background:var(--paper);color:var(--ink);font:17px/1.6 {FONT}}}
header,main{{max-width:1120px;margin:0 auto;padding:0 clamp(18px,4vw,48px)}}
header{{padding-top:clamp(36px,7vw,84px)}}
main{{padding-bottom:96px}}
h1{{font-size:clamp(1.9rem,4.6vw,3rem);line-height:1.12;letter-spacing:-.022em;margin:0;font-weight:700;
max-width:22ch;
text-wrap:balance}}
.subtitle{{color:var(--soft);margin:.7em 0 0;font-size:1.02rem;overflow-wrap:anywhere}}
nav{{display:flex;flex-wrap:wrap;gap:.35em 1.5em;margin:1.6em 0 0;padding:.8em 0;
border-top:1px solid var(--rule);
border-bottom:1px solid var(--rule);font-size:.92rem}}
nav a{{color:var(--soft);text-decoration:none}}nav a:hover{{color:var(--ink)}}
section{{margin-top:clamp(56px,8vw,96px);scroll-margin-top:16px}}
h2{{font-size:clamp(1.4rem,2.8vw,1.85rem);line-height:1.2;letter-spacing:-.015em;margin:0 0 .35em;
font-weight:680}}
h3{{font-size:1.08rem;line-height:1.3;margin:2.2em 0 .4em}}
h4,h5{{font-size:1rem;margin:1.8em 0 .3em}}
.lead p{{color:var(--soft);font-size:1.08rem;max-width:70ch;margin:.2em 0 0;text-wrap:pretty}}
.prose{{max-width:72ch;margin-top:1.5em;overflow-wrap:anywhere}}
.prose p,.prose ul{{margin:.75em 0}}.prose>:first-child{{margin-top:0}}
main>.prose:first-child{{font-size:1.16rem;line-height:1.62;margin-top:1.9em}}
ul{{padding-left:1.2em}}li{{margin:.3em 0}}
a{{color:var(--blue)}}strong{{font-weight:640}}
code{{font:.86em/1.5 {_MONO};background:var(--panel);padding:.1em .34em;border-radius:4px;
overflow-wrap:anywhere}}
pre{{background:var(--panel);border:1px solid var(--rule);border-radius:10px;padding:14px 18px;
margin:1em 0;line-height:1.6}}
pre code{{background:none;padding:0;font-size:.82rem;white-space:pre;overflow-wrap:normal}}
.scroll{{overflow-x:auto;-webkit-overflow-scrolling:touch}}
.numbers{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,290px),1fr));gap:1px;
margin:2.4em 0 0;
border:1px solid var(--rule);border-radius:14px;overflow:hidden}}
.number{{box-shadow:0 0 0 1px var(--rule);padding:20px 22px 18px}}
.number dt{{color:var(--soft);font-size:.88rem;line-height:1.35}}
.number dd{{margin:.16em 0 0;font-size:1.85rem;line-height:1.2;font-weight:660;letter-spacing:-.02em;
font-variant-numeric:tabular-nums;white-space:nowrap}}
.number p{{margin:.35em 0 0;color:var(--soft);font-size:.82rem;line-height:1.4}}
.tablebox{{margin-top:1.8em}}
table{{border-collapse:collapse;width:100%;font-size:.93rem;line-height:1.42;
font-variant-numeric:tabular-nums}}
th{{text-align:left;color:var(--soft);font-weight:560;font-size:.86rem;vertical-align:bottom}}
th,td{{padding:.6em 1.5em .6em 0;border-bottom:1px solid var(--rule)}}
th:last-child,td:last-child{{padding-right:0}}
td{{vertical-align:top;min-width:4.5em}}td:not(.num):not(:first-child){{min-width:14em}}td:first-child{{font-weight:600;white-space:nowrap}}
th.num{{text-align:right}}td.num{{text-align:right;white-space:nowrap}}
.none{{color:var(--soft)}}
.caption,figcaption{{color:var(--soft);font-size:.86rem;line-height:1.5;margin:.7em 0 0;max-width:72ch}}
figure{{margin:1.8em 0 0;max-width:600px}}
figure img{{display:block;width:100%;height:auto}}
.columns{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:0 56px;
align-items:start}}
.images{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(44%,var(--cell)),1fr));
gap:22px 18px;margin-top:2em}}
.images figure{{margin:0;min-width:0}}
.images img{{image-rendering:pixelated;border-radius:6px}}
.images figcaption{{margin-top:.45em;overflow-wrap:anywhere}}
details{{margin-top:2em;border:1px solid var(--rule);border-radius:10px;padding:0 18px}}
summary{{cursor:pointer;padding:.7em 0;color:var(--soft);font-size:.95rem}}
details[open]{{padding-bottom:18px}}details .tablebox{{margin-top:.4em}}details td{{overflow-wrap:anywhere}}
@media(max-width:640px){{body{{font-size:16px}}nav{{gap:.3em 1.1em}}
.numbers{{grid-template-columns:1fr 1fr}}
.number{{padding:15px 15px 13px}}.number dd{{font-size:1.35rem}}.number p{{font-size:.78rem}}
.images{{gap:18px 14px}}}}
@media print{{section{{break-inside:avoid-page}}nav{{display:none}}}}
""".replace("\n", "")
