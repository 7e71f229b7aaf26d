"""How the report looks, and the little it does when a reader points or presses: text that goes into the page as it is.

System typefaces only, so nothing is loaded.  Colours of artifacts are chosen to stand apart in the three common kinds of colour
blindness, once for light pages and once for dark ones; signs differ in shape too.  Without the script nothing is lost but sorting
and singling out.
"""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;
--page:#fdfcfa;--ink:#1c1b1a;--soft:#5d5a55;--faint:#8a867f;--rule:#dcd8d0;--band:#f4f1eb;--alarm:#b3261e;--good:#00664c;
--s0:#0067a8;--s1:#c8500a;--s2:#00805f;--s3:#a3337f;--s4:#8f6a00;--s5:#4b4a9c;--s6:#555350;--s7:#8c3b2a;
--serif:Charter,"Bitstream Charter","Sitka Text",Cambria,Georgia,serif;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans","Liberation Sans",Arial,sans-serif;
--mono:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace}
@media (prefers-color-scheme:dark){:root{
--page:#151517;--ink:#ebe8e2;--soft:#aaa69e;--faint:#868279;--rule:#3a3936;--band:#1e1e20;--alarm:#ff8a80;--good:#5fd0ab;
--s0:#5db4ee;--s1:#ff9a57;--s2:#3fcaa0;--s3:#e794c8;--s4:#e3bd45;--s5:#a5a4f3;--s6:#c4c1ba;--s7:#e08b78}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 var(--sans);font-variant-numeric:tabular-nums lining-nums}
main{max-width:1120px;margin:0 auto;padding:40px 24px 72px}
header{border-top:4px solid var(--ink);padding-top:14px}
.kicker{margin:0;max-width:none;font-size:13px;color:var(--soft);overflow-wrap:anywhere}
h1,h2{font-family:var(--serif);font-weight:700;line-height:1.16;letter-spacing:-.008em;text-wrap:balance;overflow-wrap:anywhere}
h1{font-size:clamp(27px,4.4vw,42px);max-width:24em;margin:22px 0 18px}
h2{font-size:clamp(21px,2.6vw,27px);margin:0 0 8px}
h3{font-size:16px;line-height:1.3;margin:0 0 8px;overflow-wrap:anywhere}
p,li,dd{max-width:70ch;overflow-wrap:anywhere}
p{margin:0 0 12px}
section{margin-top:56px;border-top:1px solid var(--rule);padding-top:20px}
.findings{margin:0;padding:0;list-style:none}
.findings li{padding:0 0 10px 18px;position:relative}
.findings li:before{content:"";position:absolute;left:0;top:.68em;width:7px;height:2px;background:var(--soft)}
.findings li:first-child{padding-left:0;font-family:var(--serif);font-size:19px;line-height:1.5;padding-bottom:16px}
.findings li:first-child:before{display:none}
.lead{color:var(--soft)}
figure{margin:34px 0 0}
.legend+figure{margin-top:18px}
figcaption,caption{font-size:13.5px;line-height:1.45;color:var(--soft);text-align:left}
figcaption{margin-bottom:14px;max-width:80ch}
figcaption b,caption b{color:var(--ink);font-size:15px;display:block;margin-bottom:2px}
caption{padding:0 0 10px}
caption span{display:block;position:sticky;left:0;width:fit-content;max-width:min(80ch,100cqi)}
.scroll{container-type:inline-size;overflow-x:auto;-webkit-overflow-scrolling:touch;margin-top:16px}
.scroll:focus-visible,button:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
table{border-collapse:collapse;font-size:14px;line-height:1.35}
table.full{width:100%}
th,td{padding:7px 0 7px 18px;text-align:right;vertical-align:top;white-space:nowrap;border-bottom:1px solid var(--rule)}
thead th{font-weight:600;font-size:12.5px;color:var(--soft);vertical-align:bottom;border-bottom:1.5px solid var(--ink);
white-space:normal;min-width:4.6em}
th:first-child,td:first-child{padding-left:0}
tbody th,th.left,td.left{text-align:left;font-weight:400}
tbody th{font-weight:600;position:sticky;left:0;background:var(--page);max-width:260px;white-space:normal;overflow-wrap:break-word}
table.full tbody th{min-width:9.5em}
td.wrap{white-space:normal;overflow-wrap:anywhere;min-width:14em}
td small,th small{display:block;font-size:11.5px;font-weight:400;color:var(--soft);white-space:nowrap}
tr.reference th,tr.reference td{color:var(--soft)}
.best{font-weight:700}
.tag{color:var(--good)!important}
.no{color:var(--soft)}
thead button{font:inherit;color:inherit;background:none;border:0;padding:0;text-align:inherit;cursor:pointer}
th[aria-sort=ascending] button:after{content:" \\2191"}
th[aria-sort=descending] button:after{content:" \\2193"}
.legend{display:flex;flex-wrap:wrap;gap:4px 6px;margin:10px 0 6px -8px}
.legend button{display:inline-flex;align-items:center;gap:6px;font:13px/1.3 var(--sans);color:var(--ink);background:none;
border:1px solid transparent;border-radius:4px;padding:3px 8px;cursor:pointer;max-width:100%;text-align:left;overflow-wrap:anywhere}
.legend button:hover{border-color:var(--rule)}
.legend button[aria-pressed=true]{border-color:var(--ink)}
.key{flex:none;vertical-align:-2px;margin-right:6px}
.legend .key{margin:0}
svg{display:block;max-width:100%}
svg.key{display:inline-block}
svg text{font:12px var(--sans);fill:var(--ink)}
svg.wide,svg.narrow{width:100%;height:auto;overflow:visible}
svg.narrow{display:none}
text.tick{fill:var(--soft)}
text.label{fill:var(--soft)}
text.name{font-weight:600;paint-order:stroke;stroke:var(--page);stroke-width:3px;stroke-linejoin:round}
.grid{stroke:var(--rule);stroke-width:1;fill:none}
.axis{stroke:var(--ink);stroke-width:1}
.frontier{fill:none;stroke:var(--faint);stroke-width:1.5;stroke-dasharray:2 4;stroke-linecap:round}
.leader{stroke:var(--faint);stroke-width:1}
.mark{fill:currentColor;stroke:var(--page);stroke-width:1}
.whisker{fill:none;stroke:currentColor;stroke-width:1.4}
.band{fill:var(--band)}
.line{fill:none;stroke:currentColor;stroke-width:1.6;stroke-linejoin:round}
.dots{fill:none;stroke:currentColor;stroke-width:4;stroke-linecap:round}
.stretch *{vector-effect:non-scaling-stroke}
.none{fill:var(--page);stroke:var(--alarm);stroke-width:1.5}
.s0{color:var(--s0)}.s1{color:var(--s1)}.s2{color:var(--s2)}.s3{color:var(--s3)}
.s4{color:var(--s4)}.s5{color:var(--s5)}.s6{color:var(--s6)}.s7{color:var(--s7)}
[data-series]{transition:opacity .15s}
.away{opacity:.12}
.plot{display:grid;grid-template-columns:var(--left,46px) minmax(0,1fr);font-size:12px;line-height:1.2;color:var(--soft)}
.up{position:relative;height:var(--height)}
.up span{position:absolute;right:8px;transform:translateY(-50%);max-width:calc(100% - 8px);overflow:hidden;text-overflow:ellipsis;
white-space:nowrap}
.area{height:var(--height);min-width:0}
.stretch{width:100%;height:100%;overflow:visible}
.dots-plot{overflow:visible}
.above{grid-column:2;height:18px;position:relative}
.above span{position:absolute;transform:translateX(-50%);white-space:nowrap}
.across{grid-column:2;position:relative;height:20px;margin-top:5px}
.across span{position:absolute;transform:translateX(-50%);white-space:nowrap}
.across i{position:absolute;right:0;top:15px;font-style:normal}
.across:has(i){height:32px}
.labelled{--left:170px}
.labelled .up{color:var(--ink);font-size:12.5px}
.panels{display:grid;grid-template-columns:repeat(var(--columns),minmax(0,1fr));gap:26px 36px;margin-top:18px}
.scale{max-width:420px;margin:14px 0 0;font-size:12px;color:var(--soft)}
.scale p{margin:0 0 4px;max-width:none}
.bar{height:10px;border-radius:1px;-webkit-print-color-adjust:exact;print-color-adjust:exact}
.marks{position:relative;height:18px;margin:3px 0 0}
.marks span{position:absolute;transform:translateX(-50%);white-space:nowrap}
.marks span:first-child{transform:none}
.marks span:last-child{transform:translateX(-100%)}
.swatch{display:inline-block;width:11px;height:11px;border:1.5px solid var(--alarm);margin:0 5px -1px 8px}
details{margin-top:14px}
summary{cursor:pointer;font-size:14px;color:var(--soft);width:fit-content;max-width:100%;overflow-wrap:anywhere}
summary:hover{color:var(--ink)}
pre,code{font:12.5px/1.5 var(--mono)}
pre{background:var(--band);padding:12px 14px;margin:8px 0 0;white-space:pre-wrap;overflow-wrap:anywhere;border-radius:3px}
.artifacts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:30px 36px;margin-top:22px}
.artifact{min-width:0}
.artifact details{margin-top:6px}
.artifact ul{margin:0 0 8px;padding-left:18px}
.artifact p,.artifact li{font-size:14.5px}
.artifact>p{margin-bottom:4px}
.facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:4px 22px;margin:14px 0 0;font-size:14.5px}
.facts dt{color:var(--soft)}
.facts dd{margin:0;max-width:none}
.glossary{columns:2;column-gap:44px;margin:14px 0 0}
.glossary div{break-inside:avoid;padding-bottom:14px}
.glossary dt{font-weight:600;font-size:15px}
.glossary dd{margin:2px 0 0;font-size:14.5px;line-height:1.5;color:var(--soft)}
footer{margin-top:56px;border-top:1px solid var(--rule);padding-top:14px;font-size:13px;color:var(--soft)}
@media (max-width:900px){.panels{grid-template-columns:repeat(min(2,var(--columns)),minmax(0,1fr))}}
@media (max-width:640px){
.panels{grid-template-columns:minmax(0,1fr)}
main{padding:24px 16px 48px}
section{margin-top:40px}
svg.wide{display:none}
svg.narrow{display:block}
.labelled{--left:112px}
.above .second,.across .second{display:none}
.glossary{columns:1}
.facts{grid-template-columns:minmax(0,1fr);gap:0}
.facts dd{padding-bottom:8px}
tbody th{max-width:132px}
.findings li:first-child{font-size:17px}
}
@media print{
:root{--page:#fff;--ink:#000;--soft:#444;--faint:#777;--rule:#ccc;--band:#f3f3f3;--alarm:#b3261e;--good:#00664c;
--s0:#0067a8;--s1:#c8500a;--s2:#00805f;--s3:#a3337f;--s4:#8f6a00;--s5:#4b4a9c;--s6:#555350;--s7:#8c3b2a}
main{max-width:none;padding:0}
body{font-size:11pt}
table{font-size:8.5pt}
th,td{padding-left:9px}
td small{white-space:normal}
.scroll{overflow:visible}
figure,.panels>div,tr,.artifact{break-inside:avoid}
h2,h3{break-after:avoid}
section{margin-top:28px}
}
"""

SCRIPT = """
(function(){
"use strict";
var chosen=null;
document.querySelectorAll("[data-focus]").forEach(function(button){
button.addEventListener("click",function(){
chosen=chosen===button.dataset.focus?null:button.dataset.focus;
document.querySelectorAll("[data-series]").forEach(function(item){
item.classList.toggle("away",chosen!==null&&item.dataset.series!==chosen)});
document.querySelectorAll("[data-focus]").forEach(function(other){
other.setAttribute("aria-pressed",String(other.dataset.focus===chosen))})})});
document.querySelectorAll("table.sortable").forEach(function(table){
var heads=Array.from(table.tHead.rows[0].cells),body=table.tBodies[0];
heads.forEach(function(head,column){
var button=document.createElement("button");
button.type="button";
while(head.firstChild)button.appendChild(head.firstChild);
head.appendChild(button);
button.addEventListener("click",function(){
var up=head.getAttribute("aria-sort")!=="ascending";
heads.forEach(function(other){other.removeAttribute("aria-sort")});
head.setAttribute("aria-sort",up?"ascending":"descending");
var rows=Array.from(body.rows).filter(function(row){return!row.classList.contains("reference")});
function value(row){var text=row.cells[column].dataset.value;return text===undefined?row.cells[column].textContent:text}
rows.sort(function(first,second){
var a=value(first),b=value(second),x=Number(a),y=Number(b);
if(a===""||b==="")return(a==="")-(b==="");
var order=isNaN(x)||isNaN(y)?a.localeCompare(b):x-y;
return up?order:-order});
rows.forEach(function(row){body.appendChild(row)})})})})})();
"""
