"""The report's style sheet: light and dark, one column on a phone."""

STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --card: #ffffff; --ink: #1c1d1f; --soft: #62666d; --line: #dedfe2; --good: #17703f;
  --bad: #b3261e; --mark: #ffd9d4; --s0: #2563c9; --s1: #c2570c; }
@media (prefers-color-scheme: dark) { :root { --bg: #141518; --card: #1d1f23; --ink: #e8e8ea; --soft: #a0a4ac; --line: #383b41;
  --good: #6fd39b; --bad: #ff8d84; --mark: #6e2a25; --s0: #7fb0ff; --s1: #ffa764; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 12px; }
p { margin: 6px 0; }
small, .note, .interval { color: var(--soft); font-weight: 400; }
.note { font-size: .85rem; }
small { font-size: .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; background: var(--card); border: 1px solid var(--line); font-size: .95rem; }
th, td { padding: 7px 14px; text-align: left; border-top: 1px solid var(--line); vertical-align: baseline; }
thead th { border-top: 0; color: var(--soft); font-weight: 600; }
tbody th { font-weight: 500; }
.scores td, .scores thead th + th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.group th { color: var(--soft); font-weight: 600; padding-top: 14px; }
td.better { color: var(--good); } td.worse, .worse.note { color: var(--bad); } td small { color: inherit; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 12px 12px 4px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 14px; font-weight: 600; font-size: .92rem; margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--line); stroke-width: 1; }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.s0 polyline { stroke: var(--s0); } .s0 circle { fill: var(--s0); } .s1 polyline { stroke: var(--s1); } .s1 circle { fill: var(--s1); }
.key { font-weight: 400; font-size: .85rem; color: var(--soft); white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 5px; vertical-align: middle; }
.k0::before { background: var(--s0); } .k1::before { background: var(--s1); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 16px; margin-top: 10px; }
article { display: flex; gap: 16px; padding: 14px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
article > div:last-child { min-width: 0; flex: 1; overflow-wrap: anywhere; }
.images { flex: 0 0 168px; display: flex; flex-direction: column; gap: 8px; }
.images img { width: 100%; border-radius: 4px; }
.tiny { image-rendering: pixelated; }
.prompt { font-weight: 600; margin-top: 0; }
dl { margin: 8px 0; } dt { color: var(--soft); font-size: .82rem; margin-top: 8px; } dd { margin: 0; white-space: pre-wrap; }
mark { background: var(--mark); color: inherit; border-radius: 3px; padding: 0 2px; }
summary { cursor: pointer; padding: 4px 0; }
pre { margin: 8px 0 0; padding: 14px; overflow-x: auto; background: var(--card); border: 1px solid var(--line); font-size: .85rem; }
@media (max-width: 600px) {
  main { padding: 16px 12px 48px; }
  h1 { font-size: 1.35rem; }
  article { flex-direction: column; }
  .images { flex: none; } .images img { max-width: 240px; }
  table { font-size: .86rem; } .scores { width: 100%; } tbody th small { display: block; }
  .scores .interval, .scores td small { display: block; font-size: .78rem; }
  th, td { padding: 6px; }
}
"""
