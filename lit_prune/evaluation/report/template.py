"""The page's template, style and script. The script sorts tables and filters answers; without it all is shown."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src '{{ script_hash }}'">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
{% for line in lines %}<p>{{ line }}</p>{% endfor %}
</header>
<main>
{% for table in tables %}
<section>
<h2>{{ table.title }}</h2>
<div class="wide">
<table>
<thead><tr>{% for column in table.columns %}
<th scope="col" aria-sort="none"{% if loop.index0 < table.names %} class="name"{% endif %}>\
<button type="button"{% if column.meaning %} title="{{ column.meaning }}"{% endif %}>{{ column.title }}</button></th>
{%- endfor %}</tr></thead>
<tbody>{% for row in table.rows %}
<tr>{% for cell in row %}<td{% if loop.index0 < table.names %} class="name"{% endif %}
 data-order="{{ '' if cell.order is none else cell.order }}">
{%- if cell.strong %}<strong>{{ cell.text }}</strong>{% else %}{{ cell.text }}{% endif -%}
{%- if cell.more %}<small>{{ cell.more }}</small>{% endif %}</td>{% endfor %}</tr>
{%- endfor %}</tbody>
</table>
</div>
{% if table.columns | selectattr("meaning") | list %}<details><summary>What the columns mean</summary><dl>
{% for column in table.columns if column.meaning %}<dt>{{ column.title }}</dt><dd>{{ column.meaning }}</dd>{% endfor %}
</dl></details>{% endif %}
</section>
{% endfor %}
{% if charts %}<section><h2>Charts</h2><div class="charts">
{% for chart in charts %}<figure><img src="{{ chart.source }}" alt="{{ chart.title }}">
<figcaption>{{ chart.title }}</figcaption></figure>{% endfor %}
</div></section>{% endif %}
<section id="answers">
<h2>Answers</h2>
{% if cards %}
<form id="filters">
<label>Answer <select name="kind"><option value="">any</option><option value="changed">not the full model's</option>
{%- for kind, words in kinds.items() %}<option value="{{ kind }}">{{ words }}</option>{% endfor %}</select></label>
<label>Method <select name="method"><option value="">any</option>
{%- for each in methods %}<option>{{ each }}</option>{% endfor %}</select></label>
{% if skills %}<label>Skill <select name="skill"><option value="">any</option>
{%- for each in skills %}<option>{{ each }}</option>{% endfor %}</select></label>{% endif %}
{% if groups %}<label>Answered from <select name="group"><option value="">any</option>
{%- for each in groups %}<option value="{{ each }}">{{ "the whole image only" if each == "rest" else \
"a " ~ each ~ " image" }}</option>{% endfor %}</select></label>{% endif %}
{% if runs %}<label>Comparison <select name="run"><option value="">any</option>
{%- for each in runs %}<option>{{ each }}</option>{% endfor %}</select></label>{% endif %}
<label>KL at least <input name="kl" type="number" min="0" step="any" inputmode="decimal"></label>
<label>Confidence at least, % <input name="sure" type="number" min="0" max="100" step="any" inputmode="decimal"></label>
<label>At most, % <input name="unsure" type="number" min="0" max="100" step="any" inputmode="decimal"></label>
<label>Text <input name="text" type="search"></label>
<button type="reset">Show all</button>
</form>
<p><output id="count" for="filters">{{ cards | length }} of {{ cards | length }} samples</output>
{%- if left_out %}; {{ left_out }} more, which fewer methods get wrong, are not in this file{% endif %}.</p>
<ul class="cards">
{% for card in cards %}
<li class="card" data-skill="{{ card.skill }}" data-group="{{ card.group }}" data-run="{{ card.run }}">
{% if card.picture %}<img src="{{ card.picture }}" alt="" loading="lazy">{% endif %}
<div>
<h3>{{ card.question }}</h3>
<p class="facts">{{ card.id }}{% if card.skill %} · {{ card.skill }}{% endif %}
{%- if card.group and card.group != "rest" %} · answered from a {{ card.group }} image{% endif %}
{%- if runs %} · {{ card.run }}{% endif %}</p>
<p>Reference: <b>{{ card.reference }}</b></p>
<p class="{{ 'right' if card.full_right else 'wrong' }}">Full model: <b>{{ card.full }}</b></p>
<ul>{% for answer in card.answers %}
<li class="answer {{ 'right' if answer.right else 'wrong' }}" data-kind="{{ answer.kind }}"
 data-method="{{ answer.method }}" data-kl="{{ '' if answer.kl is none else answer.kl }}"
 data-confidence="{{ '' if answer.confidence is none else 100 * answer.confidence }}">
{{- answer.label }}: <b>{{ answer.text }}</b>
<small>{{ kinds[answer.kind] }}
{%- if answer.confidence is not none %}; confidence {{ '%.0f' | format(100 * answer.confidence) }} %{% endif %}
{%- if answer.kl is not none %}; KL {{ '%.3f' | format(answer.kl) }}{% endif %}
{%- if answer.kept %}; {{ answer.kept }}{% endif %}</small></li>
{%- endfor %}</ul>
</div>
</li>
{%- endfor %}
</ul>
{% else %}<p>No answers were kept with these comparisons.</p>{% endif %}
</section>
</main>
<script>{{ script }}</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --line: #d5d9de; --soft: #f3f5f7; --good: #17733a; --bad: #b3261e; --back: #fff;
  --text: #1b1f24; --grey: #5b6570; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a424b; --soft: #22282e; --good: #6fd08f; --bad: #ff9a90; --back: #15191d; --text: #e6e9ec;
    --grey: #a3adb8; }
  .charts img { filter: invert(0.92) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0 auto; max-width: 90rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 0; }
header p, .facts, small, figcaption, dd { color: var(--grey); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
.name { text-align: left; }
th { vertical-align: bottom; } th button { all: unset; cursor: pointer; font-weight: 600; white-space: normal; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--back); max-width: 45vw;
  white-space: normal; }
td small { display: block; font-size: 0.75em; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 20rem; max-width: 100%; overflow-x: auto; }
.charts img { width: 100%; max-width: 60rem; min-width: 20rem; height: auto; }
form { display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; align-items: end; }
label { display: grid; font-size: 0.85rem; }
select, input, form button { font: inherit; max-width: 100%; padding: 0.25rem; }
ul { padding-left: 1.2rem; margin: 0.3rem 0 0; }
.cards { list-style: none; padding: 0; display: grid; gap: 0.8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.card { display: flex; flex-wrap: wrap; gap: 0.8rem; align-items: flex-start; padding: 0.8rem; background: var(--soft);
  border: 1px solid var(--line); border-radius: 0.5rem; }
.card > img { flex: 0 1 8rem; min-width: 5rem; max-width: 8rem; height: auto; border-radius: 0.3rem; }
.card > div { flex: 1 1 12rem; min-width: 0; } .card p { margin: 0.15rem 0; }
.right b { color: var(--good); } .wrong b { color: var(--bad); }
.right b::after { content: " \\2713"; } .wrong b::after { content: " \\2717"; }
"""

SCRIPT = """
"use strict";
for (const head of document.querySelectorAll("th")) {
  head.firstElementChild.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], place = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const each of head.parentNode.cells) each.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[place].dataset.order;
    const compare = (a, b) => (a - b) || a.localeCompare(b, undefined, { numeric: true });
    const known = [...body.rows].filter((row) => key(row) !== "").sort((a, b) => compare(key(a), key(b)));
    body.append(...(down ? known.reverse() : known), ...[...body.rows].filter((row) => key(row) === ""));
  });
}
const form = document.getElementById("filters"), cards = [...document.querySelectorAll(".card")];
const words = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
function filter() {
  const wanted = Object.fromEntries(new FormData(form)), text = wanted.text.trim().toLowerCase();
  let shown = 0;
  for (const card of cards) {
    let any = false;
    for (const answer of card.querySelectorAll(".answer")) {
      const of = answer.dataset;
      const kind = !wanted.kind || of.kind === wanted.kind || (wanted.kind === "changed" && of.kind !== "same");
      const near = !wanted.kl || (of.kl !== "" && Number(of.kl) >= Number(wanted.kl));
      const sure = !wanted.sure || (of.confidence !== "" && Number(of.confidence) >= Number(wanted.sure));
      const unsure = !wanted.unsure || (of.confidence !== "" && Number(of.confidence) <= Number(wanted.unsure));
      answer.hidden = !(kind && near && sure && unsure && (!wanted.method || of.method === wanted.method));
      any ||= !answer.hidden;
    }
    const skill = !wanted.skill || card.dataset.skill === wanted.skill;
    const run = !wanted.run || card.dataset.run === wanted.run;
    const group = !wanted.group || card.dataset.group === wanted.group;
    card.hidden = !(any && skill && group && run && words.get(card).includes(text));
    shown += !card.hidden;
  }
  document.getElementById("count").value = `${shown} of ${cards.length} samples`;
}
if (form) {
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
}
"""
