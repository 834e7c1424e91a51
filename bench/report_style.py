"""Style and script of the pages: paper, ink and one colour a backend and a stage, in light and in dark.

Texts reach 4.5:1 and marks 3:1 against what is behind them (WCAG 2.2, 1.4.3 and 1.4.11); a test computes it.
"""

from __future__ import annotations

BACKENDS = ("torch", "onnxruntime", "openvino", "tensorrt")
STAGES = ("tokenize", "encoder", "denoiser", "scheduler", "vae_decoder", "postprocess")  # in the order of a picture

STYLE = """
:root{color-scheme:light dark;--ink:#1d2329;--soft:#5c6670;--line:#d9dee3;--page:#fbfbf9;--card:#fff;--bad:#a5351f;
--torch:#8a6d3b;--onnxruntime:#2f74c0;--openvino:#7a4fb5;--tensorrt:#4c8a2b;--other:#5f6b76}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaec;--soft:#9aa4ad;--line:#343b42;--page:#14171a;--card:#1b1f23;
--bad:#f08a74;--torch:#c9a566;--onnxruntime:#6aa9ee;--openvino:#b094e6;--tensorrt:#8cc768;--other:#98a3ad}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 3rem;max-width:76rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI","Noto Sans","Noto Sans CJK SC",sans-serif}
h1{font-size:1.5rem;margin:0 0 .25rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
h3{font-size:1rem;margin:1.4rem 0 .5rem;font-weight:600;overflow-wrap:anywhere}
code{font:.82rem/1.4 ui-monospace,Menlo,Consolas,monospace;color:var(--soft);overflow-wrap:anywhere}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:3px;background:var(--card)}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.84rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .55rem;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead th{border-top:0;color:var(--soft);font-weight:600;vertical-align:bottom}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:3px;overflow:hidden}
body>.lead,section>.lead{margin:0 0 .8rem;font-size:.9rem;color:var(--soft)}
ul{padding-left:1.1rem;font-size:.9rem;color:var(--soft)}li{margin:.25rem 0;overflow-wrap:anywhere}
"""  # what the page of a search shares

PAGE_STYLE = """
:root{--s-tokenize:#8b7f2a;--s-encoder:#3f7fb5;--s-denoiser:#b5533c;--s-scheduler:#8069b0;--s-vae_decoder:#3d8b6e;
--s-postprocess:#87776b;--s-other:#6f7a84;--private:#3f7fb5;--file:#8b7f2a}
section{border-top:1px solid var(--line);margin-top:2rem;padding-top:1rem}section>h2{margin:0 0 .3rem}
thead th{white-space:normal;min-width:3.2rem}thead th span{white-space:nowrap}
@media(min-width:641px){tbody th wbr{display:none}}#summary table{font-size:.8rem}
#summary th,#summary td{padding:.35rem .45rem}
code span{white-space:nowrap}
.plots+.lead,.wide+.lead,.bars+.lead{margin-top:.7rem}
:focus-visible{outline:2px solid var(--ink);outline-offset:2px}
.l{text-align:left}tbody th{font-weight:400;text-align:left}
tbody th:first-child,thead th.stay{position:sticky;left:0;background:var(--card);z-index:1}
td.reason{text-align:left;color:var(--soft);white-space:normal;min-width:20rem}
tr.error td.reason,.bad{color:var(--bad)}.bad{font-weight:600}.num{font-variant-numeric:tabular-nums}
tr.floor th,tr.floor td{color:var(--soft);font-style:italic}
.facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.15rem 1rem;font-size:.86rem;margin:.6rem 0 0;
font-variant-numeric:tabular-nums}.facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere}
.key{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;font-size:.82rem;color:var(--soft);margin:.5rem 0 .7rem}
.key span{display:inline-flex;align-items:center;gap:.4rem}.key svg{flex:none}
.dot{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;background:var(--c);margin-right:.35rem}
.b-torch{--c:var(--torch)}.b-onnxruntime{--c:var(--onnxruntime)}.b-openvino{--c:var(--openvino)}
.b-tensorrt{--c:var(--tensorrt)}.b-other{--c:var(--other)}
.s-tokenize{--c:var(--s-tokenize)}.s-encoder{--c:var(--s-encoder)}.s-denoiser{--c:var(--s-denoiser)}
.s-scheduler{--c:var(--s-scheduler)}.s-vae_decoder{--c:var(--s-vae_decoder)}.s-postprocess{--c:var(--s-postprocess)}
.s-other{--c:var(--s-other)}.private{--c:var(--private)}.file{--c:var(--file)}
.fill{fill:var(--c)}.stroke{stroke:var(--c);fill:none}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:.8rem}
.plots.one{grid-template-columns:minmax(0,1fr)}.plots.small{grid-template-columns:
repeat(auto-fill,minmax(min(100%,17.5rem),1fr))}
.plots figure{padding:.5rem .5rem .3rem}.plots figcaption{padding:0 .2rem .3rem;font-size:.82rem}
svg.plot{display:block;width:100%;height:auto}svg.narrow{display:none}
.plot text{fill:var(--soft);font:12px system-ui,-apple-system,"Segoe UI","Noto Sans","Noto Sans CJK SC",sans-serif;
font-variant-numeric:tabular-nums}.plot text.name{fill:var(--ink)}
.plot .halo{paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
.axis{stroke:var(--line);stroke-width:1}.rule{stroke:var(--soft);stroke-width:1}
.leader{stroke:var(--soft);stroke-width:.75}.front{stroke:var(--ink);stroke-width:1.25;fill:none}
.dashed{stroke:var(--soft);stroke-width:1.25;stroke-dasharray:5 4;fill:none}.band{fill:var(--soft);opacity:.12}
.bubble{fill:var(--c);stroke:var(--c);stroke-width:1.5;fill-opacity:.75}
.area{fill:var(--c);opacity:.85}.peak{stroke:var(--ink);stroke-width:1.25}
.bars{display:grid;grid-template-columns:max-content minmax(6rem,1fr) max-content;gap:.45rem .8rem;align-items:center;
font-size:.86rem;font-variant-numeric:tabular-nums;margin-bottom:1.2rem}
.bars .row{display:contents}.bars svg{display:block;width:100%;height:18px}.figure{color:var(--soft)}
.figure b{color:var(--ink)}.name{overflow-wrap:anywhere}
.whisker{stroke:var(--ink);stroke-width:1.5}.floor-line{stroke:var(--ink)}
@media(prefers-color-scheme:dark){.bars .fill,.bubble{fill-opacity:.55}}.bubble.beaten{fill-opacity:.12}
td.stack{min-width:15rem;width:30%}td.stack svg{display:block;width:100%;height:16px}
.cut-line{stroke:var(--card);stroke-width:1}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.8rem}
.picture{display:block;width:100%;height:auto;background:#8883}
.plate{position:relative;overflow:hidden}.plate .over{position:absolute;inset:0;height:100%}
.plate .ref{clip-path:inset(0 calc(100% - var(--cut,0%)) 0 0)}.plate .heat{display:none}
.plate .line{position:absolute;inset:0 auto 0 calc(var(--cut,0%) - 1px);width:1px;background:var(--ink);display:none}
.frame input,label.all{display:none}.js .frame input{display:block}.js label.all{display:inline-flex}
.js .plate .line{display:block}
input[type=range]{accent-color:var(--soft);width:calc(100% - 1rem);margin:.4rem .5rem 0;min-height:24px;
cursor:ew-resize}
.switches{display:flex;flex-wrap:wrap;gap:.4rem 1.6rem;margin:.3rem 0 1rem;font-size:.92rem}
.switches label{display:inline-flex;gap:.5rem;align-items:center;cursor:pointer;min-height:28px}
.switches input[type=range]{width:9rem;margin:0}
.magma{display:inline-block;width:6rem;height:.7rem;vertical-align:middle;
background:linear-gradient(90deg,#000004,#51127c,#b73779,#fc8961,#fcfdbf)}
body:has(#heat:checked) .judged .heat{display:block}
figcaption{padding:.45rem .6rem .55rem;font-size:.8rem;line-height:1.4;font-variant-numeric:tabular-nums}
figcaption b{display:block;overflow-wrap:anywhere}figcaption span{display:block;color:var(--soft)}
.missing{padding:1.5rem .6rem;color:var(--bad);font-size:.8rem;overflow-wrap:anywhere;white-space:normal}
.sheet td,.sheet th{text-align:left;vertical-align:top;padding:.4rem .5rem}.sheet table{width:auto}
.sheet td{min-width:7.5rem;width:8.5rem;max-width:13rem;white-space:normal;font-size:.8rem}
.sheet td span{display:block;color:var(--soft)}
.sheet thead th{color:var(--ink)}.sheet small{color:var(--soft);font-weight:400}
.mini{margin-top:.2rem;font-size:inherit}.mini th,.mini td{padding:0;
border:0;font-weight:400;color:var(--soft);min-width:0}
.mini th[scope=col]{text-align:right}.mini td,.mini th[scope=col]{padding-left:.5rem}
.mini tr:nth-child(2)>*{color:var(--ink)}.mini tbody th:first-child{position:static;max-width:none}
.sheets{display:flex;flex-wrap:wrap;gap:0 1.5rem}.sheets>div{max-width:100%;min-width:0}
#store{position:absolute;width:0;height:0;overflow:hidden}
@media(max-width:640px){body{padding:1rem .75rem 2rem}svg.wide-plot{display:none}svg.narrow{display:block}
.facts{grid-template-columns:minmax(0,1fr)}.facts dd{margin-bottom:.35rem}
.bars{display:block}.bars .row{display:grid;grid-template-columns:minmax(0,1fr) max-content;gap:.1rem .6rem;
margin-bottom:.8rem}.bars svg{grid-column:1/-1;order:3}
.grid{grid-template-columns:repeat(2,minmax(0,1fr));gap:.5rem}figcaption{padding:.35rem .45rem .45rem;font-size:.75rem}
tbody th:first-child{min-width:5rem;white-space:normal;overflow-wrap:break-word}td.stack{min-width:11rem}
.mini,.mini tbody th:first-child{min-width:0}.sheet td{min-width:7.5rem;width:8rem}}
"""

SCRIPT = """document.documentElement.classList.add("js");
addEventListener("input",function(e){var t=e.target;if(t.type!=="range")return;
(t.id==="all"?document.querySelectorAll(".frame"):[t.closest(".frame")]).forEach(function(f){
f.style.setProperty("--cut",t.value+"%");f.querySelector("input").value=t.value})});"""


def backend_class(backend: str) -> str:
    """The CSS class with a backend's colour, the same in every figure."""
    name = backend.split()[0] if backend.split() else ""
    return f"b-{name if name in BACKENDS else 'other'}"


def stage_class(stage: str) -> str:
    """The CSS class with a stage's colour; all text encoders share one."""
    return f"s-{next((s for s in STAGES if s == stage or (s == 'encoder' and 'text_encoder' in stage)), 'other')}"
