"""Variant glyphs of Chinese characters that the traditional-to-simplified conversion does not know.

Old editions write one character in several ways (隠 for 隱, 髙 for 高, 逺 for 遠). OpenCC's dictionaries
cover the common ones; the pairs below are those that occur in the Complete Tang and Song Poems and
survive the conversion. Each pair is VARIANT then STANDARD (traditional) form, and never changes the
length of a text. Pairs whose two members can be different words (棹/櫂, 沉/沈, 勾/鉤) are left out here;
the rhyme table (data/poetry/build.py) has them too, because there they only share a pronunciation.
"""

_PAIRS = """
疎疏 鬰鬱 鶑鶯 劒劍 鬭鬥 鬬鬥 蘂蕊 臯皋 猨猿 髙高 巵卮 馿驢 牋箋 隣鄰 餠餅 飈飆 閙鬧 懽歡 壠壟 鉏鋤 筯箸
斾旆 鳯鳳 峩峨 檝楫 缾瓶 堦階 虀齏 畧略 迺乃 穉稚 秪祇 踈疏 潄漱 犂犁 鏁鎖 鼈鱉 飜翻 廻回 欵款 邉邊 羮羹
磵澗 栢柏 槩概 覊羈 笻筇 悞誤 逈迥 烱炯 穽阱 暎映 幙幕 顇悴 緜綿 歘欻 顦憔 壻婿 纒纏 輙輒 秖祇 讐讎 頳赬
朶朵 碁棋 蠧蠹 憇憩 斵斲 呌叫 翺翱 鵶鴉 仝同 瓌瑰 譍應 皷鼓 藂叢 邨村 躭耽 濶闊 蕚萼 鸎鶯 粃秕 囘回 敧欹
氊氈 葅菹 逺遠 厓崖 棃梨 塲場 艶豔 啣銜 闗關 霶滂 朞期 廼乃 箒帚 呪咒 槖橐 寜寧 觧解 筭算 蟇蟆 飡餐 脇脅
窻窗 寃冤 椶棕 闚窺 嚢囊 斚斝 輭軟 帬裙 汚汙 虵蛇 袠帙 鞵鞋 灔灩 鐡鐵 甦蘇 礲礱 牕窗 陁陀 趂趁 釡釜 籖籤
隮躋 嘷嗥 蒭芻 甆瓷 駞駝 麏麇 飇飆 賖賒 襃褒 糢模 徃往 犇奔 刼劫 轝輿 麕麇 篛箬 尅剋 湼涅 氷冰 袵衽 鞾靴
菓果 鷰燕 鰕蝦 簴虡 鎻鎖 衘銜 攲欹 禆裨 眀明 曵曳 膓腸 欝鬱 濵濱 纎纖 嵓巖 聨聯 勑敕 蜨蝶 苖苗 縳縛 僣僭
韲齏 扄扃 覉羈 皜皓 冩寫 戸戶 煑煮 巓巔 簮簪 甎磚 舩船 凴憑 崕崖 齩咬 蓺藝 鑛礦 壍塹 卭邛 亷廉 砲炮 鵞鵝
悤匆 爼俎 禩祀 韮韭 擥攬 沲沱 郷鄉 罋甕 旍旌 蕋蕊 糓穀 聼聽 聮聯 樷叢 裩褌 埜野 皐皋 徤健 帀匝 凟瀆 疉疊
畊耕 抝拗 冺泯 緐繁 妳你 頋顧 羗羌 袛祗 喦巖 糺糾 甞嘗 憙喜 娯娛 尙尚 軃嚲 姢娟 樐櫓 聫聯 熈熙 飑飆 謩謨
戱戲 愽博 欎鬱 圎圓 昬昏 攷考 緫總 廹迫 譌訛 虗虛 倂併 閧鬨 熖焰 彛彝 頟額 莾莽 呑吞 抺抹 滛淫 煕熙 鈆鉛
餙飾 恠怪 儛舞 蟁蚊 畮畝 畆畝 寕寧 劵券 闘鬥 冐冒 摠總 墖塔 酧酬 勌倦 窰窯 鑴鐫 撁牽 筞策 恱悅 皥皞 躶裸
忩匆 騘驄 禇褚 靁雷 鼔鼓 吚咿 脗吻 妬妒 暁曉 醻酬 衺邪 旾春 賷齎 贑贛 崐崑 崘崙 埀垂 黙默 咲笑 覔覓 陗峭
襍雜 喆哲 琹琴 竚佇 嫰嫩 鬪鬥 鬦鬥 劔劍 舡船 衹祇 鬛鬣 瑠琉 嶤嶢 隠隱 簷檐 髪髮 頼賴 浄淨 粧妝 寛寬 歳歲
揺搖 薫薰 毎每 徴徵 懐懷 渇渴 効效 様樣 巌巖 戯戲 醤醬 穏穩 衞衛 勲勳 勅敕 歴歷 痩瘦 専專 撃擊 覇霸 掲揭
帯帶 覧覽 頴穎 捜搜 涙淚 荘莊 敍敘 聴聽 縦縱 醸釀 黒黑 歩步 増增 逓遞 賛贊 従從 錬鍊 瀬瀨 髄髓 犠犧 穂穗
穣穰 馀餘 稲稻 収收 挿插 繍繡 児兒 縆緪 鉄鐵 尭堯 徳德 恵惠 剰剩 抜拔 圏圈 焼燒 両兩 銭錢 関關 塩鹽 斎齋
曽曾 縁緣 譲讓 掻搔 臓臟 酔醉 騒騷 麹麴 麤粗 嬾懶 隄堤 櫂棹 恡吝 悋吝 鑪爐 鴈雁 隟隙
"""

VARIANTS: dict[str, str] = {pair[0]: pair[1] for pair in _PAIRS.split()}
